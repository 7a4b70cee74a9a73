"""Meets what a request asks for, where any endpoint can."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .predicted_latency import PredictedLatency


class Slo(PredictedLatency):
    """``predicted_latency`` among the endpoints that are predicted to meet the SLO, if there are any.

    Prefill: score = ``predicted_latency``'s + ``LATE`` if left + cost is more than what remains of the TTFT
    that was asked for. Decode: an endpoint whose predicted step time is more than the TPOT that was asked
    for comes after all others with room. ``x-pd-ttft-slo-ms`` and ``x-pd-tpot-slo-ms`` say what is asked for,
    else ``ttft_slo`` and ``tpot_slo`` of the configuration; without either it is ``predicted_latency``.

    When requests wait in the scheduler, one that no endpoint can serve in time any more lets all others
    pass; with a priority below zero it is refused.
    """

    def prefill_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, limit: float = math.inf
    ) -> list[float]:
        """Add ``LATE`` to the score of those that would miss the TTFT."""
        if request.ttft_slo is not None:
            limit = request.ttft_slo - (request.now - request.arrived)
        return super().prefill_scores(endpoints, request, limit)

    def decode_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, limit: float = math.inf
    ) -> list[float]:
        """Add ``LATE`` to the score of those that would miss the TPOT."""
        return super().decode_scores(endpoints, request, request.tpot_slo or limit)

    def hopeless(self, request: RequestContext, cost: float) -> bool:
        """Whether even an idle endpoint would be too late."""
        return request.ttft_slo is not None and request.now + cost > request.arrived + request.ttft_slo
