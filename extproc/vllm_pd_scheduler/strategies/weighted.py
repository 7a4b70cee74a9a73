"""``weighted``: least weighted sum of load, KV-cache use and latency."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy, request_counts


class Weighted(Strategy):
    """For fleets of unequal instances. Score is the sum of

    - ``load_weight`` * requests / most requests,
    - ``kv_cache_weight`` * share of the KV cache in use, and
    - ``latency_weight`` * latency / highest latency.

    The highest values are those among the endpoints of this pick, so that each quotient lies between 0 and 1.
    *latency* is the mean time to first token (P) or per output token (D) that the last two scrapes saw. An
    endpoint that reports none gets the mean of the others, so that it is neither preferred nor avoided.
    """

    def accepts_sample(self, request: RequestContext) -> bool:
        """Return ``True``: a low score is enough, it need not be the lowest."""
        return True

    def terms(self, endpoint: Endpoint, request: RequestContext) -> dict[str, float]:
        """Return what is weighted, before it is divided and weighted."""
        found = {"requests": endpoint.requests, "kv_usage": endpoint.kv_usage}
        if (latency := endpoint.latency) is not None:
            found["latency"] = latency
        return found

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> list[float]:
        """Return the score of each."""
        config, loads = self.config, request_counts(endpoints)
        metrics = [endpoint.metrics for endpoint in endpoints]
        latencies = [m.latency if m is not None else None for m in metrics]
        known = [latency for latency in latencies if latency is not None]
        mean, highest = (sum(known) / len(known), max(known)) if known else (0.0, 0.0)
        load_weight = config.load_weight / max(1.0, max(loads))
        kv_weight = config.kv_cache_weight
        latency_weight = config.latency_weight / highest if highest > 0 else 0.0
        return [
            load_weight * requests
            + (kv_weight * m.kv_usage if m is not None else 0.0)
            + latency_weight * (mean if latency is None else latency)
            for m, requests, latency in zip(metrics, loads, latencies, strict=True)
        ]
