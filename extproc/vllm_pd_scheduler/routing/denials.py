"""Instances that deny having an adapter that they are known to list: it may just have been unloaded."""

from __future__ import annotations

from collections.abc import Callable

from ..fleet.endpoint import Endpoint

STALE_S = 3.0
"""Seconds in which an instance's list is read again, also on a busy machine, once it has denied a model."""

FORGET_S = 60.0
"""Seconds without a denial after which the next one is a first one again."""


class Denials:
    """Says which 404 are an instance's fault. ``read_again`` has the lists of models read, and does not wait.

    An adapter that an instance listed when it was last asked, it may have unloaded since. So the first denial
    has the lists read again, and those that come before that are nobody's fault. One that goes on to list
    what it denies does worse than its peers. A base model cannot be unloaded.
    """

    def __init__(self, read_again: Callable[[], None]) -> None:
        self._read_again = read_again
        self._first: dict[Endpoint, tuple[float, float]] = {}
        """When each has denied an adapter first, and last."""

    def count(self, endpoint: Endpoint, model: str | None, now: float) -> bool:
        """Note that an endpoint has denied a model; return whether that counts against it."""
        first, last = self._first.get(endpoint, (now, now))
        if now - last > FORGET_S:
            first = now
        if model not in endpoint.models.adapters:
            # But for requests that were under way while the list was read.
            return endpoint not in self._first or now - first > STALE_S
        if first == now:
            self._first = {e: t for e, t in self._first.items() if now - t[1] <= FORGET_S}
        self._first[endpoint] = (first, now)
        if now - first > STALE_S:
            return True
        self._read_again()
        return False
