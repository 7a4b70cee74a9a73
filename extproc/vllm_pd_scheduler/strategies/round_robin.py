"""Each endpoint in turn."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy


class RoundRobin(Strategy):
    """The k-th request goes to endpoint k mod n. For fleets of equal instances and equal requests."""

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Start at the endpoint whose turn it is and go round."""
        start = self._turn % len(endpoints)
        self._turn += 1
        return [*endpoints[start:], *endpoints[:start]][:count]
