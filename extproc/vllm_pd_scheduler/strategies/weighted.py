"""A weighted sum of load, KV-cache use and latency."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy, all_requests


class Weighted(Strategy):
    """For fleets of unequal instances.

    score = load_weight * requests / max requests
    + kv_cache_weight * share of the KV cache in use
    + latency_weight * latency / max latency

    The maxima are over the candidates of this pick, so that each term lies between 0 and 1. An endpoint
    with no latency measured yet counts with the candidates' mean: neither punished nor preferred.
    """

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> list[float]:
        """Return the weighted sum of each."""
        config, loads = self.config, all_requests(endpoints)
        metrics = [endpoint.metrics for endpoint in endpoints]
        latencies = [m.latency if m is not None else None for m in metrics]
        known = [latency for latency in latencies if latency is not None]
        mean, most = (sum(known) / len(known), max(known)) if known else (0.0, 0.0)
        load_weight = config.load_weight / max(1.0, max(loads))
        kv_weight = config.kv_cache_weight
        latency_weight = config.latency_weight / most if most > 0 else 0.0
        return [
            load_weight * requests
            + (kv_weight * m.kv_usage if m is not None else 0.0)
            + latency_weight * (mean if latency is None else latency)
            for m, requests, latency in zip(metrics, loads, latencies, strict=True)
        ]
