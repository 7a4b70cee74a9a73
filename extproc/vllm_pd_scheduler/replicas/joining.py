"""What this replica asks of the others: what it has missed, or, when it joins, what it cannot know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from .message import MAX_ASKED, Ask, unpack_blocks

SETTLE_S = 0.1
"""Seconds after the first was heard until one is asked: by then all have said how much they know."""
_PATIENCE_S = 2.0
"""Seconds without an answer after which it is asked again, the next one if there is one."""
_MAX_TRIES = 3
MAX_GAPS = 64


class Joining:
    """Asks one other for all that is cached, some endpoints at a time, and each for what it has told in vain.

    It joins when it first hears of one that knows something, and again when one is back: while that was
    silent, both have missed what the other did.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._wanted: dict[Endpoint, None] = {}
        self._asked: dict[Endpoint, None] = {}
        self._sources: dict[str, int] = {}
        """Those that may be asked, and the blocks that they know."""
        self._source = ""
        self._due = -1e9
        self._tries = 0
        self._joined = False
        self._gaps: list[Ask] = []

    @property
    def missing(self) -> int:
        """Endpoints of which is not known yet what is cached there."""
        return len(self._wanted) + len(self._asked)

    def heard(self, name: str, blocks: int, back: bool, now: float) -> None:
        """Note the first summary of another, which takes so many blocks for cached."""
        if not blocks or (self._joined and not back):
            if name in self._sources:
                self._sources[name] = blocks
            return
        if not self._sources:
            self._due = now + SETTLE_S
            self._tries = 0
        self._sources[name] = blocks
        self._wanted |= dict.fromkeys(e for e in self._registry if e not in self._asked)

    def left(self, name: str) -> None:
        """Note that another is gone: who was asked is asked no more."""
        self._sources.pop(name, None)
        if name == self._source:
            self._due = -1e9

    def missed(self, name: str, first: int, last: int) -> None:
        """Note that messages of another, with these numbers, have not come."""
        if len(self._gaps) < MAX_GAPS:
            self._gaps.append(Ask(name, first, last))

    def due(self, now: float) -> float | None:
        """Return when to ask next for what is cached; ``None`` if nothing is wanted."""
        return max(now, self._due) if self.missing and self._sources else None

    @property
    def has_gaps(self) -> bool:
        """Whether there is something to ask of messages that have not come."""
        return bool(self._gaps)

    def gaps(self) -> list[Ask]:
        """Return what to ask of messages that have not come."""
        gaps, self._gaps = self._gaps, []
        return gaps

    def asks(self, now: float) -> Iterator[tuple[str, Sequence[Endpoint], bool]]:
        """Yield whom to ask for the blocks of which endpoints, and whether for what it has learned too."""
        if not self.missing or not self._sources or now < self._due:
            return
        if self._asked:  # in vain
            self._tries += 1
            if len(self._sources) > 1:
                self._sources.pop(self._source, None)
            if self._tries > _MAX_TRIES:
                self._end()
                return
        first = not self._source
        self._source = max(self._sources, key=lambda each: (self._sources[each], each))
        self._wanted = self._asked | self._wanted
        self._asked = dict.fromkeys([e for e in self._wanted if e in self._registry][:MAX_ASKED])
        self._wanted = {e: None for e in self._wanted if e not in self._asked and e in self._registry}
        self._due = now + _PATIENCE_S
        if self._asked:
            yield self._source, list(self._asked), first
        else:
            self._end()

    def answered(self, name: str, endpoint: Endpoint, blocks: bytes, now: float) -> None:
        """Take the blocks of an endpoint, if they were asked for."""
        if name != self._source or endpoint not in self._asked:
            return
        del self._asked[endpoint]
        endpoint.holder.restore(unpack_blocks(blocks))
        self._tries, self._due = 0, now + _PATIENCE_S
        if not self._asked:
            self._due = now
            if not self._wanted:
                self._end()

    def _end(self) -> None:
        self._joined, self._source = True, ""
        self._wanted, self._asked, self._sources = {}, {}, {}
