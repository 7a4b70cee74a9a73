"""``predicted_latency``: least predicted time to first token on P, and per output token on D."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..prediction.transfer_rates import HandOffs
from ..request.context import RequestContext
from .base import Strategy

WORK_WEIGHT = 1.0
"""What a second of an instance's work counts, besides the second that this request waits for it.

Work also delays the requests that come after. 1 is a choice: it stands for one later request that each
prefill delays. With less, requests leave the instance that has their prefix cached for a shorter queue
sooner.
"""

TOLERANCE = 0.02
"""Share by which prefill scores may exceed the least one and still count as equal, so that they take turns.

Else the instance that seems to be a hair faster than the others would get every request while the fleet is
idle, and its cache would hold all prefixes. Predictions are much less exact than 2 %, so nothing is lost.
"""

LATE_PENALTY = 1e6
"""Added to the score, in seconds, of an endpoint that would miss the limit: it comes after all others."""
NO_ROOM_PENALTY = 1e9
"""Added to the score of an endpoint without room in its KV cache: it comes after the late ones too."""


class PredictedLatency(Strategy):
    """Ranks by what the load model predicts (see :mod:`vllm_pd_scheduler.prediction.load_model`).

    Prefill: score = wait + (1 + ``WORK_WEIGHT``) * cost, in seconds.

    - *wait*: predicted time until the instance is done with the prefills that are queued there.
    - *cost*: predicted time to compute the tokens of this prompt that are not cached there.

    wait + cost is the time to the first token. The cost counts once more because it also delays the requests
    that come after: without that, a cached prefix would be worth too little.

    Decode: score = step + (1 + ``WORK_WEIGHT``) * hand-off / answer, in seconds for each token of the answer,
    with step = base + per_seq * (requests + 1) + per_kv_token * (KV tokens + prompt + answer).

    - *step*: predicted seconds of a step with this request: the time per output token of all there.
    - *hand-off*: predicted seconds until the D has what the P of this request has computed, by how long other
      hand-offs of this P took there (see :mod:`vllm_pd_scheduler.prediction.transfer_rates`); 0 for a request
      without a P. It counts twice, as the work on P does, because others wait for the same links.
    - *answer*: the expected length of the answer, in tokens.
    - An endpoint whose KV cache has no room for prompt and answer comes after all that have room
      (``NO_ROOM_PENALTY``), and the more tokens it lacks the later.
    """

    reads_prefixes = True

    def accepts_sample(self, request: RequestContext) -> bool:
        """Return ``True``: a low predicted time is enough, it need not be the lowest."""
        return True

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Rank as all strategies do, but take the best prefill scores for equal within ``TOLERANCE``."""
        if count > 1 or endpoints[0].instance.role is InstanceRole.DECODE:
            return super().rank(endpoints, request, count)
        self._turn += 1
        scores = self.last_scores = self.prefill_scores(endpoints, request)
        best, turn = min(scores), self._turn % len(scores)
        bound = best + TOLERANCE * (best - LATE_PENALTY if best >= LATE_PENALTY else best)
        at = next(i for i in chain(range(turn, len(scores)), range(turn)) if scores[i] <= bound)
        return [endpoints[at]]

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[float]:
        """Return the score of each endpoint, by the role that all of them have."""
        if endpoints[0].instance.role is InstanceRole.DECODE:
            return self.decode_scores(endpoints, request)
        return self.prefill_scores(endpoints, request)

    def terms(self, endpoint: Endpoint, request: RequestContext) -> dict[str, float]:
        """Return wait, cost and cached tokens on P; on D step and hand-off, and what is there without it."""
        if endpoint.instance.role is InstanceRole.DECODE:
            requests, tokens = endpoint.requests, endpoint.kv_tokens
            own = request.prompt_tokens + request.output_tokens
            step = endpoint.decode.step(requests + 1, tokens + own)
            found = {"step": step, "requests": requests, "kv_tokens": tokens}
            if request.handoffs is not None:
                overhead, per_token, times, _ = request.handoffs
                fetched = request.prompt_tokens - request.block_tokens * request.cached_blocks(
                    endpoint.holder
                )
                found["handoff"] = (overhead + per_token * max(0.0, fetched)) * times[endpoint.id]
            return found
        load, prompt = endpoint.prefill, request.prompt_tokens
        cached = request.cached.get(endpoint.holder, 0) * request.block_tokens
        new = prompt - load.trust * cached
        if new < 1.0:
            new = 1.0
        cost = load.overhead + load.per_token * new + load.per_pair * new * (prompt - new / 2)
        wait = load.remaining(request.now) if load.queued else 0.0
        return {"wait": wait, "cost": cost, "cached_tokens": cached}

    def prefill_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, limit: float = math.inf
    ) -> list[float]:
        """Return the score of each, with ``LATE_PENALTY`` if it misses a TTFT of ``limit`` seconds.

        It repeats the code of :meth:`PrefillLoad.remaining` and :meth:`Endpoint.prefill_cost`: calls for
        1,000 endpoints would take a millisecond.
        """
        now, prompt, block_tokens = request.now, request.prompt_tokens, request.block_tokens
        depth_of, factor, limited = request.cached.get, 1.0 + WORK_WEIGHT, limit < math.inf
        before, new, pairs = -1.0, 0.0, 0.0
        scores = []
        for endpoint in endpoints:
            load = endpoint.prefill
            wait = load.queued
            if wait:
                elapsed = now - load.head_at
                wait -= elapsed if elapsed < load.head_cost else load.head_cost
            blocks = load.trust * depth_of(endpoint.holder, 0)
            if blocks != before:  # neighbours mostly hold the same: nothing, or a prefix that all share
                before, new = blocks, prompt - blocks * block_tokens
                if new < 1.0:
                    new = 1.0
                pairs = new * (prompt - new / 2)
            cost = load.overhead + load.per_token * new + load.per_pair * pairs
            score = wait + factor * cost
            if limited and wait + cost > limit:
                score += LATE_PENALTY
            scores.append(score)
        return scores

    def decode_scores(
        self, endpoints: Sequence[Endpoint], request: RequestContext, limit: float = math.inf
    ) -> list[float]:
        """Return the score of each, with ``LATE_PENALTY`` if a step takes more than ``limit`` seconds.

        Without room in the KV cache, the penalty is ``NO_ROOM_PENALTY`` plus the missing tokens.
        """
        own = request.prompt_tokens + request.output_tokens
        scores = []
        for endpoint in endpoints:  # repeats Endpoint.requests and Endpoint.kv_tokens, to save calls
            capacity, load = endpoint.kv_capacity, endpoint.decode
            batch = endpoint.in_flight + 1.0 + endpoint.others_requests
            tokens = endpoint.tokens + own + endpoint.others_tokens
            step = load.base + load.per_seq * batch + load.per_kv_token * tokens
            if capacity is not None and tokens > capacity:
                step += NO_ROOM_PENALTY + tokens - capacity
            elif step > limit:
                step += LATE_PENALTY
            scores.append(step)
        if request.handoffs is not None:
            _add_handoffs(scores, endpoints, request, request.handoffs)
        return scores


def _add_handoffs(
    scores: list[float], endpoints: Sequence[Endpoint], request: RequestContext, handoffs: HandOffs
) -> None:
    """Add to the score of each D what the hand-off there takes, for each token of the answer."""
    overhead, per_token, times, usual = handoffs
    known, of_others = times.get, usual.get
    weight, cached = (1.0 + WORK_WEIGHT) / max(1.0, request.output_tokens), request.cached
    least, whole = weight * overhead, weight * (overhead + per_token * request.prompt_tokens)
    if not cached:
        for place, endpoint in enumerate(endpoints):
            name = endpoint.id
            scores[place] += whole * (known(name) or of_others(name, 1.0))
        return
    depth_of, of_block = cached.get, weight * per_token * request.block_tokens
    for place, endpoint in enumerate(endpoints):
        name, seconds = endpoint.id, whole - of_block * depth_of(endpoint.holder, 0)
        factor = known(name) or of_others(name, 1.0)
        scores[place] += (seconds if seconds > least else least) * factor
