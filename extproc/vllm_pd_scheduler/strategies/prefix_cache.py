"""Where the longest prefix is cached, unless too much is queued there."""

from __future__ import annotations

from collections.abc import Sequence

from ..endpoint import Endpoint
from ..models import RequestContext
from .base import Strategy, all_requests

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

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> list[tuple[int, float]]:
        """Return (-cached blocks, requests) of each, the first 0 where the cache does not count."""
        loads, cached = all_requests(endpoints), request.cached
        most, enough = min(loads) + _MORE, _SHARE * len(request.blocks)
        scores = []
        for endpoint, requests in zip(endpoints, loads, strict=True):
            depth = cached.get(endpoint.holder, 0) if cached and requests <= most else 0
            scores.append((-depth if depth >= enough else 0, requests))
        return scores
