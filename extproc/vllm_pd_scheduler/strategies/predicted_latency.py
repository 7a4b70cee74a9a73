"""Least predicted time to first token for prefill, least predicted time per token for decode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..request.context import RequestContext
from .base import Strategy

WORK_WEIGHT = 1.0
"""What a second of an instance's work counts beside a second of waiting: it delays those who come after."""


SAME = 0.02
"""Share by which predictions may differ and mean the same. Else the instance that seems to be a hair faster
than the others would get all that comes while the fleet is idle, and its cache would hold all prefixes."""

LATE = 1e6
"""Added to the score, in seconds, of an endpoint that is late: it comes after all that are not."""
NO_ROOM = 1e9
"""Added to the score of an endpoint whose KV cache has no room: it comes after all others."""


class PredictedLatency(Strategy):
    """The load model decides (see :mod:`vllm_pd_scheduler.prediction.load_model`).

    Prefill: score = left + (1 + WORK_WEIGHT) * cost, where ``left`` is the predicted time until what is
    queued there is done and ``cost`` that of this request's uncached tokens. ``left + cost`` is the time to
    first token; the cost counts again because work that a cache would have saved delays whoever comes next.

    Decode: score = base + per_seq * (requests + 1) + per_kv_token * (KV tokens + prompt + expected
    answer), the predicted step time. An endpoint without room in its KV cache for that comes after all
    that have it, in the order of what is missing.
    """

    reads_prefixes = True

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """As for all strategies; prefill scores that differ by less than ``SAME`` count as equal."""
        if count > 1 or endpoints[0].instance.role is InstanceRole.DECODE:
            return super().rank(endpoints, request, count)
        self._turn += 1
        scores = self.prefill_scores(endpoints, request)
        best, turn = min(scores), self._turn % len(scores)
        bound = best + SAME * (best - LATE if best >= LATE else best)
        at = next(i for i in chain(range(turn, len(scores)), range(turn)) if scores[i] <= bound)
        return [endpoints[at]]

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[float]:
        """Return the score of each, for its role."""
        if endpoints[0].instance.role is InstanceRole.DECODE:
            return self.decode_scores(endpoints, request)
        return self.prefill_scores(endpoints, request)

    def prefill_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, limit: float = math.inf
    ) -> list[float]:
        """Return the score of each, ``LATE`` more for a time to first token above ``limit``.

        Written out, since a call for each of 1,000 would cost a millisecond.
        """
        now, prompt, block_tokens = request.now, request.prompt_tokens, request.block_tokens
        depth_of, factor, limited = request.cached.get, 1.0 + WORK_WEIGHT, limit < math.inf
        before, new, pairs = -1.0, 0.0, 0.0
        scores = []
        for endpoint in endpoints:
            load = endpoint.prefill
            left = load.queued
            if left:
                elapsed = now - load.head_at
                left -= elapsed if elapsed < load.head_cost else load.head_cost
            blocks = load.trust * depth_of(endpoint.holder, 0)
            if blocks != before:  # neighbours mostly hold the same: nothing, or a prefix that all share
                before, new = blocks, prompt - blocks * block_tokens
                if new < 1.0:
                    new = 1.0
                pairs = new * (prompt - new / 2)
            cost = load.overhead + load.per_token * new + load.per_pair * pairs
            score = left + factor * cost
            if limited and left + cost > limit:
                score += LATE
            scores.append(score)
        return scores

    def decode_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, limit: float = math.inf
    ) -> list[float]:
        """Return the predicted step time of each, ``LATE`` more above ``limit``.

        Where KV tokens are missing it is ``NO_ROOM`` and their number more.
        """
        own = request.prompt_tokens + request.output_tokens
        scores = []
        for endpoint in endpoints:  # Endpoint.requests and Endpoint.kv_tokens, written out
            metrics, capacity, load = endpoint.metrics, endpoint.kv_capacity, endpoint.decode
            batch, tokens = endpoint.in_flight + 1.0, endpoint.tokens + own
            if metrics is not None:
                others = metrics.running + metrics.waiting - endpoint.in_flight_at_scrape
                if others > 0.0:
                    batch += others
                if capacity is not None:
                    others = metrics.kv_usage * capacity - endpoint.tokens_at_scrape
                    if others > 0.0:
                        tokens += others
            step = load.base + load.per_seq * batch + load.per_kv_token * tokens
            if capacity is not None and tokens > capacity:
                step += NO_ROOM + tokens - capacity
            elif step > limit:
                step += LATE
            scores.append(step)
        return scores
