"""How a strategy has ranked endpoints for one request, to be shown with the request's decision."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from ..records.decision import Choice
from ..request.context import RequestContext
from .candidates import LARGE_FLEET, Candidates
from .fence import StrategyFence

COMPARED = 3
"""Endpoints whose terms are shown: the one that was taken, and the best others."""


@dataclass(slots=True, eq=False)
class Ranking:
    """What ``strategy``, called ``name``, has made of ``offered``: it is true until the next pick."""

    strategy: StrategyFence
    name: str
    candidates: Candidates
    offered: tuple[Endpoint, ...]
    exclude: Collection[Endpoint]
    ranked: list[Endpoint]

    def choice(self, registry: Registry, role: InstanceRole, request: RequestContext) -> Choice:
        """Return it as it can be remembered: nothing here grows with the fleet but references."""
        candidates, offered, ranked = self.candidates, self.offered, self.ranked
        number = len(offered)
        scores, compared = self.strategy.compared(offered, ranked, COMPARED)
        if number > LARGE_FLEET:
            scores = None if scores is None else [scores[offered.index(each)] for each in compared]
            offered = tuple(compared)
        return Choice(
            self.name,
            ranked,
            offered,
            scores,
            number,
            self.strategy.terms(compared, request),
            registry.out_of_service(role),
            registry.routable(role),
            candidates.endpoints,
            frozenset(candidates.on_trial),
            tuple(self.exclude),
            not candidates.many,
        )
