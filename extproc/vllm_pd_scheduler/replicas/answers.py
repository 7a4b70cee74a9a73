"""What others ask of this replica: what they have missed, or all that one who joins must know."""

from __future__ import annotations

from itertools import chain

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from .message import MAX_HELD, Ask
from .placements import Placed, Told

BLOCKS_PER_S = 200_000.0
"""Hashes that are told again in a second, whoever asks: 1.6 MB."""
_BURST = 20_000.0
_MAX_GAPS = 64


class Answers:
    """Answers what was asked, at a bounded pace: one endpoint's blocks a message."""

    def __init__(self, registry: Registry, told: Told) -> None:
        self._registry, self._told = registry, told
        self._gaps: list[tuple[int, int]] = []
        self._endpoints: dict[str, None] = {}
        """Ids of those whose blocks were asked for."""
        self._rates = False
        self._room = _BURST
        self._at = -1e9

    def asked(self, ask: Ask, ids: list[str]) -> None:
        """Note what another asks; ``ids`` are the endpoints of its message."""
        if ask.last and len(self._gaps) < _MAX_GAPS:
            self._gaps.append((ask.first, ask.last))
        for place in ask.endpoints:
            if len(self._endpoints) < len(self._registry.endpoints()):
                self._endpoints[ids[place]] = None
        self._rates = self._rates or ask.rates

    def due(self, now: float) -> float | None:
        """Return when the next answer may be given; ``None`` if there is none to give."""
        if not (self._gaps or self._endpoints or self._rates):
            return None
        self._refill(now)
        return now if self._room > 0 else now - self._room / BLOCKS_PER_S

    def placements(self, now: float) -> list[Placed]:
        """Return what was told in messages that somebody has missed, the newest first."""
        self._refill(now)
        gaps, self._gaps = self._gaps, []
        found: list[Placed] = []
        for each in chain.from_iterable(self._told.by(*gap) for gap in gaps):
            if self._room <= 0:
                break  # what is older than that is soon cached no more
            self._room -= len(each[1])
            found.append(each)
        return found

    def held(self, now: float) -> tuple[Endpoint, list[int]] | None:
        """Return the blocks of an endpoint that somebody has asked for, those used last first."""
        self._refill(now)
        while self._endpoints and self._room > 0:
            name = next(iter(self._endpoints))
            del self._endpoints[name]
            if (endpoint := self._registry.find(name)) is not None:
                blocks = endpoint.holder.newest(MAX_HELD)
                self._room -= len(blocks)
                return endpoint, blocks
        return None

    def rates(self) -> bool:
        """Whether somebody has asked what was learned of pairs."""
        asked, self._rates = self._rates, False
        return asked

    def _refill(self, now: float) -> None:
        self._room = min(_BURST, self._room + BLOCKS_PER_S * max(0.0, now - self._at))
        self._at = now
