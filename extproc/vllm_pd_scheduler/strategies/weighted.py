"""A weighted sum of load, KV-cache use and latency."""

from __future__ import annotations

from collections.abc import Sequence

from ..endpoint import Endpoint
from ..models import RequestContext
from .base import Strategy


class Weighted(Strategy):
    """For fleets of unequal instances.

    score = load_weight * requests / max requests
    + kv_cache_weight * share of the KV cache in use
    + latency_weight * latency / max latency

    The maxima are over the candidates of this pick, so that each term lies between 0 and 1. An endpoint
    with no latency measured yet counts with the candidates' mean: neither punished nor preferred.
    """

    _max_requests = 1.0
    _max_latency = 0.0
    _mean_latency = 0.0

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Find the maxima, then rank by score."""
        self._max_requests = max(1.0, *(e.requests for e in endpoints))
        known = [e.latency for e in endpoints if e.latency is not None]
        self._max_latency = max(known, default=0.0)
        self._mean_latency = sum(known) / len(known) if known else 0.0
        return super().rank(endpoints, request, count)

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the weighted sum, with the maxima of this pick."""
        config = self.config
        score = config.load_weight * endpoint.requests / self._max_requests
        score += config.kv_cache_weight * endpoint.kv_usage
        if self._max_latency > 0:
            latency = self._mean_latency if endpoint.latency is None else endpoint.latency
            score += config.latency_weight * latency / self._max_latency
        return score
