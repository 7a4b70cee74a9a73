"""``prefix_cache``: where most of the prompt is cached, unless too many requests are there."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy, request_counts

_MIN_CACHED_SHARE = 0.5
"""Share of the prompt's blocks that must be cached for the cache to count.

A choice: with less, a short prefix that all prompts share (a system prompt) would gather them on one
instance.
"""
_MAX_EXTRA_REQUESTS = 2
"""Requests that an endpoint may have more than the least loaded one for its cache to count.

A choice between cache hits (more) and even load (less). It is meant for prefills, of which an instance does
one after another, so that two more are a long wait.
"""
_BLOCK_BONUS = 1e6
"""Subtracted from the score for each cached block: more than any count of requests, so that blocks are
compared first and requests only among equals."""


class PrefixCache(Strategy):
    """Score = requests - ``_BLOCK_BONUS`` * cached blocks.

    - *requests*: running and queued there, see :attr:`Endpoint.requests`.
    - *cached blocks*: leading blocks of the prompt that are cached there. They count only if they are at
      least half of the prompt and the endpoint has at most two requests more than the least loaded one;
      else 0.

    So the longest cached prefix wins, then the fewest requests. It knows nothing of how long anything takes:
    see ``predicted_latency`` for that.
    """

    reads_prefixes = True

    def accepts_sample(self, request: RequestContext) -> bool:
        """Return ``True``: a low load is enough, it need not be the lowest."""
        return True

    def terms(self, endpoint: Endpoint, request: RequestContext) -> dict[str, float]:
        """Return the requests there, and the leading blocks of the prompt that are cached."""
        return {"requests": endpoint.requests, "cached_blocks": request.cached_blocks(endpoint.holder)}

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> list[float]:
        """Return the score of each."""
        loads, depth_of = request_counts(endpoints), request.cached.get
        max_load, min_depth = min(loads) + _MAX_EXTRA_REQUESTS, _MIN_CACHED_SHARE * len(request.blocks)
        scores = []
        for endpoint, requests in zip(endpoints, loads, strict=True):
            depth = depth_of(endpoint.holder, 0) if requests <= max_load else 0
            scores.append(requests - _BLOCK_BONUS * depth if depth >= min_depth else requests)
        return scores
