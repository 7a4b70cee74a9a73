"""Least predicted time to first token for prefill, least predicted time per token for decode."""

from __future__ import annotations

from collections.abc import Sequence

from ..endpoint import Endpoint
from ..load import prefill_pairs
from ..models import InstanceRole, RequestContext
from .base import Strategy

WORK_WEIGHT = 1.0
"""What a second of an instance's work counts beside a second of waiting: it delays those who come after."""


class PredictedLatency(Strategy):
    """The load model decides (see :mod:`vllm_pd_scheduler.load`).

    Prefill: score = left + (1 + WORK_WEIGHT) * cost, where ``left`` is the predicted time until what is
    queued there is done and ``cost`` that of this request's uncached tokens. ``left + cost`` is the time to
    first token; the cost counts again because work that a cache would have saved delays whoever comes next.

    Decode: score = base + per_seq * (requests + 1) + per_kv_token * (KV tokens + prompt + expected
    answer), the predicted step time. An endpoint without room in its KV cache for that comes after all
    that have it, in the order of what is missing.
    """

    reads_prefixes = True

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Score all; equal ones take turns."""
        if endpoints[0].instance.role is InstanceRole.DECODE:
            return super().rank(endpoints, request, count)
        self._turn += 1
        scores = self.prefill_scores(endpoints, request)
        size = len(scores)
        if count == 1:  # min() and index() are loops in C
            best, turn = min(scores), self._turn % size
            try:
                return [endpoints[scores.index(best, turn)]]
            except ValueError:
                return [endpoints[scores.index(best)]]
        order = sorted(range(size), key=lambda i: (scores[i], (i - self._turn) % size))
        return [endpoints[i] for i in order[:count]]

    def prefill_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, work_weight: float | None = None
    ) -> list[float]:
        """Return the score of each. Written out, since a call for each of 1,000 would cost a millisecond."""
        now, prompt = request.now, request.prompt_tokens
        cached, block_tokens = request.cached, request.block_tokens
        factor = 1.0 + (WORK_WEIGHT if work_weight is None else work_weight)
        all_pairs = prefill_pairs(prompt, prompt)
        scores = []
        for endpoint in endpoints:
            load = endpoint.prefill
            left = load.queued
            if left:
                elapsed = now - load.head_at
                left -= elapsed if elapsed < load.head_cost else load.head_cost
            depth = cached.get(endpoint.holder) if cached else None
            if depth is None:
                cost = load.overhead + load.per_token * prompt + load.per_pair * all_pairs
            else:
                cost = load.cost(max(1.0, prompt - load.trust * depth * block_tokens), prompt)
            scores.append(left + factor * cost)
        return scores

    def score(self, endpoint: Endpoint, request: RequestContext) -> tuple[float, float]:
        """Return (KV tokens that are missing, predicted step time) for decode."""
        own = request.prompt_tokens + request.output_tokens
        kv_tokens = endpoint.kv_tokens + own
        missing = 0.0 if endpoint.kv_capacity is None else max(0.0, kv_tokens - endpoint.kv_capacity)
        return missing, endpoint.decode.step(endpoint.requests + 1, kv_tokens)
