"""Batches of one publisher in their order, although some may be lost on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_HELD = 1000
"""Batches that wait for those before them."""


@dataclass(slots=True)
class InOrder:
    """Says which batches are next. Numbers are the publisher's: one more for each batch, from 0.

    A publisher that has a replay socket is asked again for those that were lost: :attr:`asks_from` says from
    which number on.
    """

    can_replay: bool
    lost: int = 0
    """Batches that did not come, and were not replayed."""
    restarts: int = 0
    asks_from: int | None = None
    _next: int | None = None
    _fresh: bool = True
    """Whether nothing was heard yet: what was published before is none of ours."""
    _held: dict[int, bytes] = field(default_factory=dict)
    _replaying: bool = False
    _asked: int = 0
    """From which number on the newest replay was asked for."""

    def began(self) -> None:
        """Ask for what was published before."""
        if self.can_replay:
            self._next = 0
            self._ask()

    def live(self, number: int, batch: bytes) -> tuple[bool, list[bytes]]:
        """Return whether the publisher is another process now, and the batches that are next."""
        restarted = self._next is not None and number < self._next
        if restarted:
            self.restarts += 1
            self._next, self._held, self._fresh = None, {}, True
            self._replaying, self.asks_from = False, None
            self.began()
        if self._next is None:
            self._next = number
        if number > self._next and self.can_replay:
            if not self._replaying:
                self._ask()
            self._held[number] = batch
            return restarted, self.given_up() if len(self._held) > MAX_HELD else []
        return restarted, self._take(number, batch)

    def replayed(self, number: int, batch: bytes) -> list[bytes]:
        """Return the batches that are next, after one that was asked for; ``number`` -1 is the last."""
        if not self._replaying:
            return []
        if number < 0:
            if self._held and self._next is not None and self._next > self._asked:
                self._ask()  # what is missing was lost after the publisher had looked
                return []
            return self.given_up()
        if self._next is not None and number < self._next:
            return []
        return self._take(number, batch)

    def given_up(self) -> list[bytes]:
        """Return what was held, since no more will be replayed."""
        self._replaying, self.asks_from = False, None
        held, self._held = sorted(self._held.items()), {}
        found = []
        for number, batch in held:
            if self._next is None or number >= self._next:
                found += self._take(number, batch)
        return found

    def _ask(self) -> None:
        if self.can_replay:
            self.asks_from, self._replaying = self._next, True
            self._asked = self._next or 0

    def _take(self, number: int, batch: bytes) -> list[bytes]:
        self.lost += 0 if self._fresh or self._next is None else number - self._next
        self._next, self._fresh = number + 1, False
        found = [batch]
        while self._next in self._held:
            found.append(self._held.pop(self._next))
            self._next += 1
        return found
