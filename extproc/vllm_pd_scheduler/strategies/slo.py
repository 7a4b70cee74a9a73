"""``slo``: as ``predicted_latency``, but endpoints that keep a request's limits come first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import AGEING
from .predicted_latency import PredictedLatency

LONGEST_LIMIT_S = 30.0
"""Limit in the queue of a request that has none, or a longer one.

A choice: so much longer at most it waits for those with a short one, however short.
"""


class Slo(PredictedLatency):
    """The score of ``predicted_latency``, plus ``LATE_PENALTY`` if the limit would be missed.

    - Prefill: if wait + cost is more than what remains of the TTFT limit since the request's arrival.
    - Decode: if the step time is more than the TPOT limit and there is room in the KV cache.

    So endpoints that are predicted to keep the limit come before those that are not, and each group is
    ranked as by ``predicted_latency``. A client sets the limits by ``x-pd-ttft-slo-ms`` and
    ``x-pd-tpot-slo-ms``, the configuration for all others by ``ttft_slo`` and ``tpot_slo``. Without a limit
    there is no difference.

    Among those that wait in the scheduler a limit counts as so much less waiting: order = cost + ``AGEING`` *
    (arrival + limit). So of two that are alike the one with less time left goes first.

    A request that waits in the scheduler and that no endpoint can serve in time any more waits until no
    other request does; with a priority below 0 it is refused.
    """

    def prefill_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, limit: float = math.inf
    ) -> list[float]:
        """Return the score of each, with a penalty for those that would miss the TTFT limit."""
        if request.ttft_slo is not None:
            limit = request.ttft_slo - (request.now - request.arrived)
        return super().prefill_scores(endpoints, request, limit)

    def decode_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, limit: float = math.inf
    ) -> list[float]:
        """Return the score of each, with a penalty for those that would miss the TPOT limit."""
        return super().decode_scores(endpoints, request, request.tpot_slo or limit)

    def order(self, request: RequestContext, cost: float) -> float:
        """Return the place of a request among those that wait: the less time it has left, the earlier."""
        limit = LONGEST_LIMIT_S if request.ttft_slo is None else min(request.ttft_slo, LONGEST_LIMIT_S)
        return super().order(request, cost) + AGEING * limit

    def hopeless(self, request: RequestContext, cost: float) -> bool:
        """Whether even an idle endpoint would miss the TTFT limit."""
        return request.ttft_slo is not None and request.now + cost > request.arrived + request.ttft_slo
