"""How a strategy has ranked endpoints for one request, to be shown with the request's decision."""

from __future__ import annotations

from array import array
from collections.abc import Collection

from msgspec import Struct

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from ..records.decision import Choice
from ..request.context import RequestContext
from .candidates import LARGE_FLEET, Candidates
from .fence import StrategyFence


class Ranking(Struct, gc=False, eq=False):
    """What ``strategy``, called ``name``, has made of ``offered``: it is true until the next pick."""

    strategy: StrategyFence
    name: str
    candidates: Candidates
    offered: tuple[Endpoint, ...]
    exclude: Collection[Endpoint]
    ranked: list[Endpoint]

    def choice(self, registry: Registry, role: InstanceRole, request: RequestContext) -> Choice:
        """Return it as it can be remembered: nothing here grows with the fleet but references."""
        candidates, offered = self.candidates, self.offered
        number, picked = len(offered), self.ranked[0]
        scores, terms = self.strategy.explained(number, picked, request)
        if number > LARGE_FLEET:
            scores, offered = _of(picked, offered, scores), (picked,)
        return Choice(
            self.name,
            picked,
            terms,
            offered,
            scores,
            number,
            registry.out_of_service(role),
            registry.routable(role),
            candidates.endpoints,
            tuple(candidates.on_trial),
            tuple(self.exclude),
            number <= LARGE_FLEET and not candidates.many,
        )


def _of(picked: Endpoint, offered: tuple[Endpoint, ...], scores: array[float]) -> array[float]:
    """Return the score of one."""
    width, at = len(scores) // len(offered), offered.index(picked)
    return scores[at * width : (at + 1) * width]
