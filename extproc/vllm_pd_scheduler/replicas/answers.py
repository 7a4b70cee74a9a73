"""What others ask of this replica: what they have missed, or all that one who joins must know."""

from __future__ import annotations

from itertools import chain

from .directory import Directory
from .message import MAX_HELD, MAX_ITEMS, MAX_PART, Ask
from .placements import Placed, Told

BLOCKS_PER_S = 200_000.0
"""Hashes that are told again in a second, whoever asks: 1.6 MB."""
_BURST = 20_000.0
_MAX_GAPS = 64


class Answers:
    """Answers what was asked, at a bounded pace: a part of one endpoint's blocks a message."""

    def __init__(self, directory: Directory, told: Told) -> None:
        self._directory, self._told = directory, told
        self._gaps: list[tuple[int, int]] = []
        self._endpoints: dict[int | str, None] = {}
        """Names of those whose blocks were asked for."""
        self._parts: tuple[int | str, list[int], int] | None = None
        """One of them, its blocks, and how many of these are told."""
        self._rates = False
        self._room = _BURST
        self._at = -1e9

    def asked(self, ask: Ask, names: list[int | str]) -> None:
        """Note what another asks; ``names`` are those of its message."""
        if ask.last and len(self._gaps) < _MAX_GAPS:
            self._gaps.append((ask.first, ask.last))
        for place in ask.endpoints:
            if len(self._endpoints) < MAX_ITEMS:
                self._endpoints[names[place]] = None
        self._rates = self._rates or ask.rates

    @property
    def wanted(self) -> bool:
        """Whether there is something to answer."""
        return bool(self._gaps or self._endpoints or self._parts or self._rates)

    def due(self, now: float) -> float | None:
        """Return when the next answer may be given; ``None`` if there is none to give."""
        if not self.wanted:
            return None
        self._refill(now)
        return now if self._room > 0 else now - self._room / BLOCKS_PER_S

    def placements(self, now: float) -> list[Placed]:
        """Return what was told in messages that somebody has missed, the newest first."""
        self._refill(now)
        if self._room <= 0:
            return []
        gaps, self._gaps = self._gaps, []
        found: list[Placed] = []
        for each in chain.from_iterable(self._told.by(*gap) for gap in gaps):
            if self._room <= 0:
                break  # what is older than that is soon cached no more
            self._room -= len(each[1])
            found.append(each)
        return found

    def held(self, now: float) -> tuple[int | str, list[int], int, bool] | None:
        """Return a part of the blocks of an endpoint that was asked for, those used last first.

        The endpoint is named as it was; one that is not known here has none. With the blocks come how many
        were returned before, and whether there are more.
        """
        self._refill(now)
        if self._room <= 0:
            return None
        if self._parts is None and self._endpoints:
            name = next(iter(self._endpoints))
            del self._endpoints[name]
            found = self._directory.find(name)
            self._parts = name, [] if found is None else found.holder.newest(MAX_HELD), 0
        if self._parts is None:
            return None
        name, blocks, at = self._parts
        part, end = blocks[at : at + MAX_PART], at + MAX_PART
        more = end < len(blocks)
        self._parts = (name, blocks, end) if more else None
        self._room -= len(part)
        return name, part, at, more

    def rates(self) -> bool:
        """Whether somebody has asked what was learned of pairs."""
        asked, self._rates = self._rates, False
        return asked

    def _refill(self, now: float) -> None:
        self._room = min(_BURST, self._room + BLOCKS_PER_S * max(0.0, now - self._at))
        self._at = now
