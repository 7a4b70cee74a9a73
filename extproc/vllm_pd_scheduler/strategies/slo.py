"""Meets what a request asks for, where any endpoint can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..endpoint import Endpoint
from ..models import RequestContext
from .predicted_latency import PredictedLatency

LATE = 1e9
"""Added to the score of an endpoint that would miss the SLO: it comes after all that would not."""


class Slo(PredictedLatency):
    """``predicted_latency`` among the endpoints that are predicted to meet the SLO, if there are any.

    Prefill: score = ``predicted_latency``'s + 1e9 if left + cost is more than what remains of the TTFT
    that was asked for. Decode: an endpoint whose predicted step time is more than the TPOT that was asked
    for comes after all others with room. ``x-pd-ttft-slo-ms`` and ``x-pd-tpot-slo-ms`` say what is asked for,
    else ``ttft_slo`` and ``tpot_slo`` of the configuration; without either it is ``predicted_latency``.

    When requests wait in the scheduler, one that no endpoint can serve in time any more lets all others
    pass; with a priority below zero it is refused.
    """

    def prefill_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, work_weight: float | None = None
    ) -> list[float]:
        """Add ``LATE`` to the score of those that would miss the TTFT."""
        scores = super().prefill_scores(endpoints, request)
        if request.ttft_slo is None:
            return scores
        left = request.ttft_slo - (request.now - request.arrived)
        ttfts = super().prefill_scores(endpoints, request, 0.0)
        return [s if ttft <= left else s + LATE for s, ttft in zip(scores, ttfts, strict=True)]

    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        """Return (KV tokens missing, whether the TPOT is missed, predicted step time) for decode."""
        missing, step = super().score(endpoint, request)
        return missing, request.tpot_slo is not None and step > request.tpot_slo, step

    def hopeless(self, request: RequestContext, cost: float) -> bool:
        """Whether even an idle endpoint would be too late."""
        return request.ttft_slo is not None and request.now + cost > request.arrived + request.ttft_slo
