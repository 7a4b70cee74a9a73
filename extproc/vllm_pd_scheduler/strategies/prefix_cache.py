"""Where the longest prefix is cached, unless too much is queued there."""

from __future__ import annotations

from collections.abc import Sequence

from ..endpoint import Endpoint
from ..models import RequestContext
from .base import Strategy

_SHARE = 0.5
"""Cached share of the prompt from which on it is worth a longer queue."""
_MORE = 2
"""Requests that an endpoint may have beyond the least loaded one and still get its prefixes."""


class PrefixCache(Strategy):
    """Most cached tokens among the endpoints that are not overloaded; fewest requests otherwise.

    An endpoint counts with its cache if at least half of the prompt is there and it has at most two
    requests more than the least loaded; score = (-cached blocks if so, else 0; requests). It knows nothing
    of how long anything takes: see ``predicted_latency`` for that.
    """

    reads_prefixes = True

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Find the least load, then rank by score."""
        self._bound = min(e.requests for e in endpoints) + _MORE
        return super().rank(endpoints, request, count)

    def score(self, endpoint: Endpoint, request: RequestContext) -> tuple[float, float]:
        """Return (-cached blocks, requests), the first 0 where the cache does not count."""
        requests = endpoint.requests
        depth = request.cached.get(endpoint.holder, 0)
        counts = requests <= self._bound and depth >= _SHARE * len(request.blocks)
        return -depth if counts else 0, requests

    _bound = 0.0
