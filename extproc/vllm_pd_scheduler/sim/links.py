"""Transfers that share the bandwidth of the links on their ways, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .virtual import Handle, VirtualClock

_DONE = 1e-6
"""Bytes that are less than a rounding error."""


@dataclass(eq=False)
class Link:
    """One direction of a network port, or of a cable between switches."""

    capacity: float
    """Bytes a second."""


@dataclass(slots=True, eq=False)
class _Transfer:
    route: Sequence[Link]
    left: float
    """Bytes that are still to come."""
    on_end: Callable[[], None]
    rate: float = 0.0
    """Bytes a second, now."""


@dataclass(eq=False)
class Links:
    """Gives each transfer its max-min fair share, as many flows of TCP or RDMA over one link roughly get.

    No transfer can be faster without another one, which is not faster than it, being slower (Bertsekas and
    Gallager, "Data Networks", 6.5.2). The shares change whenever a transfer begins or ends.
    """

    clock: VirtualClock
    _transfers: list[_Transfer] = field(default_factory=list)
    _as_of: float = 0.0
    _next_end: Handle | None = None

    @property
    def under_way(self) -> int:
        """Transfers that have begun and not ended."""
        return len(self._transfers)

    def send(self, route: Sequence[Link], size: float, on_end: Callable[[], None]) -> None:
        """Begin a transfer of ``size`` bytes over all links of ``route``; call ``on_end`` at its end."""
        self._advance()
        self._transfers.append(_Transfer(route, size, on_end))
        self._share()

    def _advance(self) -> None:
        elapsed = self.clock.now - self._as_of
        self._as_of = self.clock.now
        if elapsed > 0:
            for transfer in self._transfers:
                transfer.left -= transfer.rate * elapsed

    def _share(self) -> None:
        """Give all their rates, and wait for the first that ends."""
        self._fill()
        if self._next_end is not None:
            self._next_end.cancel()
            self._next_end = None
        if self._transfers:
            first = min(max(0.0, each.left) / each.rate for each in self._transfers)
            self._next_end = self.clock.call_at(self.clock.now + first, self._on_end)

    def _fill(self) -> None:
        """Raise all rates together; those that share a link which is full stay as they are."""
        rising = list(self._transfers)
        free: dict[Link, float] = {link: link.capacity for each in rising for link in each.route}
        while rising:
            users: dict[Link, int] = {}
            for each in rising:
                for link in each.route:
                    users[link] = users.get(link, 0) + 1
            full, share = min(((link, free[link] / n) for link, n in users.items()), key=lambda one: one[1])
            still = []
            for each in rising:
                if full not in each.route:
                    still.append(each)
                    continue
                each.rate = max(share, _DONE)
                for link in each.route:
                    free[link] = max(0.0, free[link] - share)
            rising = still

    def _on_end(self) -> None:
        self._next_end = None
        self._advance()
        least = min(each.left for each in self._transfers)
        ended = [each for each in self._transfers if each.left <= max(_DONE, least)]
        self._transfers = [each for each in self._transfers if each.left > max(_DONE, least)]
        self._share()
        for each in ended:
            each.on_end()
