"""Where the longest prefix is cached, unless too much is queued there."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy, all_requests

_SHARE = 0.5
"""Cached share of the prompt from which on it is worth a longer queue."""
_MORE = 2
"""Requests that an endpoint may have beyond the least loaded one and still get its prefixes."""
_BLOCK = 1e6
"""Requests that make up for a cached block: more than there are, so that blocks are compared first."""


class PrefixCache(Strategy):
    """Most cached tokens among the endpoints that are not overloaded; fewest requests otherwise.

    An endpoint counts with its cache if at least half of the prompt is there and it has at most two
    requests more than the least loaded; score = requests - 1e6 * cached blocks if so, else requests. It
    knows nothing of how long anything takes: see ``predicted_latency`` for that.
    """

    reads_prefixes = True

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> list[float]:
        """Return the requests of each, ``_BLOCK`` less for each cached block where the cache counts."""
        loads, depth_of = all_requests(endpoints), request.cached.get
        most, enough = min(loads) + _MORE, _SHARE * len(request.blocks)
        scores = []
        for endpoint, requests in zip(endpoints, loads, strict=True):
            depth = depth_of(endpoint.holder, 0) if requests <= most else 0
            scores.append(requests - _BLOCK * depth if depth >= enough else requests)
        return scores
