"""``round_robin``: each endpoint in turn."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy


class RoundRobin(Strategy):
    """Sends the k-th request to endpoint k mod n. For fleets of equal instances and equal requests."""

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return ``count`` endpoints from the one whose turn it is on, in a ring."""
        start = self._turn % len(endpoints)
        self._turn += 1
        first = endpoints[start : start + count]
        return [*first, *endpoints[: min(start, count - len(first))]]
