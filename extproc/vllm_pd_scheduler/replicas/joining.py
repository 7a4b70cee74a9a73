"""What this replica asks of the others: what it has missed, or, when it joins, what it cannot know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from .message import MAX_ASKED, Ask, Held, unpack_blocks

SETTLE_S = 0.1
"""Seconds after the first was heard until one is asked: by then all have said how much they know."""
_PATIENCE_S = 2.0
"""Seconds without an answer after which it is asked again, the next one if there is one."""
_MAX_TRIES = 3
_MANY = 100
"""Blocks that another may know more than twice as many as we do and these, before it is asked once more."""
MAX_GAPS = 64


class Joining:
    """Asks one other for all that is cached, some endpoints at a time, and each for what it has told in vain.

    It joins when it first hears of one that knows something, and again when one is back: while that was
    silent, both have missed what the other did.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._wanted: dict[Endpoint, None] = {}
        self._asked: dict[Endpoint, int] = {}
        """Those asked for, and how many blocks of each have come."""
        self._sources: dict[str, int] = {}
        """Those that may be asked, and the blocks that they know."""
        self._source = ""
        self._due = -1e9
        self._tries = 0
        self._joined = False
        self._wants_rates = False
        """Whether what others have learned of pairs is to be asked for."""
        self._gaps: list[Ask] = []

    @property
    def missing(self) -> int:
        """Endpoints of which is not known yet what is cached there."""
        return len(self._wanted) + len(self._asked)

    def heard(self, name: str, blocks: int, back: bool, now: float) -> None:
        """Note the first summary of another, which takes so many blocks for cached."""
        knows_more = blocks > 2 * len(self._registry.prefixes) + _MANY
        if self._joined and not back and not knows_more:
            return
        if not self._sources:
            self._due = now + SETTLE_S
            self._tries = 0
        self._sources[name] = blocks
        self._wants_rates = True
        if blocks:
            self._wanted |= dict.fromkeys(e for e in self._registry if e not in self._asked)

    def left(self, name: str) -> None:
        """Note that another is gone: who was asked is asked no more."""
        self._sources.pop(name, None)
        if name == self._source:
            self._due = -1e9

    def missed(self, name: str, first: int, last: int) -> None:
        """Note that messages of another, with these numbers, have not come."""
        if name == self._source:  # a part may be missing, without which the rest is not found
            self._wanted, self._asked = dict.fromkeys((*self._asked, *self._wanted)), {}
            self._due = -1e9
        if len(self._gaps) < MAX_GAPS:
            self._gaps.append(Ask(name, first, last))

    def due(self, now: float) -> float | None:
        """Return when to ask next for what is cached; ``None`` if nothing is wanted."""
        wants = self._sources and (self.missing or self._wants_rates)
        return max(now, self._due) if wants else None

    @property
    def wants(self) -> bool:
        """Whether there is something to ask, now or later."""
        return bool(self._gaps or (self._sources and (self.missing or self._wants_rates)))

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
        if (due := self.due(now)) is None or now < due:
            return
        if self._asked:  # in vain
            self._tries += 1
            if len(self._sources) > 1:
                self._sources.pop(self._source, None)
            if self._tries > _MAX_TRIES:
                self._end()
                return
        self._source = max(self._sources, key=lambda each: (self._sources[each], each))
        self._wanted = dict.fromkeys((*self._asked, *self._wanted))
        self._asked = dict.fromkeys([e for e in self._wanted if e in self._registry][:MAX_ASKED], 0)
        self._wanted = {e: None for e in self._wanted if e not in self._asked and e in self._registry}
        self._due = now + _PATIENCE_S
        if self._asked or self._wants_rates:
            yield self._source, list(self._asked), self._wants_rates
        self._wants_rates = False
        if not self._asked:
            self._end()

    def answered(self, name: str, endpoint: Endpoint, held: Held, now: float) -> None:
        """Take blocks of an endpoint, if they were asked for."""
        if name != self._source or endpoint not in self._asked:
            return
        if held.before != self._asked[endpoint]:
            return  # it answers another one, or one has not come: all is asked again
        blocks = unpack_blocks(held.blocks)
        endpoint.holder.restore(blocks)
        self._asked[endpoint] += len(blocks)
        self._tries, self._due = 0, now + _PATIENCE_S
        if held.more:
            return
        del self._asked[endpoint]
        if not self._asked:
            self._due = now
            if not self._wanted:
                self._end()

    def _end(self) -> None:
        self._joined, self._source = True, ""
        self._wanted, self._asked, self._sources = {}, {}, {}
