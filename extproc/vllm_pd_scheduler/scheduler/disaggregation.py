"""Decides whether a request is split, or a decode instance does its prefill too."""

from __future__ import annotations

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..prediction.prefill_load import prefill_pairs
from ..request.context import RequestContext
from ..strategies.base import request_counts
from ..strategies.predicted_latency import WORK_WEIGHT
from . import Scheduler
from .stalls import Stalls

STALL_WEIGHT = 5.0
"""What a second of prefill on D counts for each answer that runs there, against a second of waiting.

A prefill on D makes all its running answers stand still. The factor keeps a better time to the first token
from being paid for by the time per token: with 3, large fleets had a worse time per token.
"""

USUAL_TPOT = 1.25
"""By ``tpot``, how many times its usual time a token may take, where no limit is set: a choice."""
SLACK_SHARE = 0.5
"""By ``tpot``, the share of an answer's slack that prefills may use. Short answers have less slack than the
mean one, and predictions are not exact. Tuned in the replay."""
_LEAST_ANSWER_S = 0.1
"""Seconds that an answer is expected to take at least."""
DELAY_WEIGHT = 0.3
"""By ``tpot``, what a second of prefill on D counts for each answer there: it should be worth something."""


class Disaggregation:
    """Decides by the setting ``disaggregation``: always, never, from a prompt length on, by cost or by TPOT.

    By cost (``auto``) a request stays on decode instance D if ``local <= remote``, in predicted seconds::

        local  = prefill on D * (1 + STALL_WEIGHT * requests on D)
        remote = wait on P + (1 + WORK_WEIGHT) * prefill on P + KV transfer

    - *prefill on D*, *prefill on P*: time to compute the tokens of the prompt that are not cached there.
    - *requests on D*: at least the mean over all D (over a sample of a large fleet), since a D that is idle
      now gets others meanwhile.
    - *wait on P*: time until P is done with the prefills queued there.
    - *WORK_WEIGHT*: see :mod:`vllm_pd_scheduler.strategies.predicted_latency`.

    So a long prompt goes to P. A short one, or one that D has cached, stays on a D with little to do, and so
    does a longer one while all P have a queue.

    By TPOT (``tpot``) it stays on D if ``local < remote``, where answers that would miss their time per token
    count as in ``auto``::

        local = prefills given to D before + prefill on D * (1 + DELAY_WEIGHT * requests on D)
                + STALL_WEIGHT * requests on D * over
        over  = seconds that answers on D stand still - SLACK_SHARE * (limit - step) * tokens of a mean answer

    - *limit*: ``tpot_slo``, or what the request asks for, or ``USUAL_TPOT`` times the step.
    - *stand still*: see :class:`.Stalls`, and this prefill. A D without answers has none that could.
    - *over* is at least 0, and at most this prefill. So D reads beyond the limit only what would take P far
      longer: a conversation of 200,000 tokens that only D has cached, of which 3,000 are new.
    """

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler) -> None:
        self._config = config
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._stalls = Stalls()

    def local_endpoint(self, request: RequestContext) -> Endpoint | None:
        """Return the decode instance that should serve a request alone; ``None`` if it is to be split."""
        setting = self._config.disaggregation
        if setting == "always":
            return None
        if setting == "auto":
            return self._cheaper_than_split(request)
        if setting == "tpot":
            return self._sooner_than_split(request)
        if setting == "never" or request.prompt_tokens < setting:
            return next(iter(self._scheduler.preview(InstanceRole.DECODE, request)), None)
        return None

    def _cheaper_than_split(self, request: RequestContext) -> Endpoint | None:
        prefill = self._scheduler.preview(InstanceRole.PREFILL, request)
        if not prefill:
            return None
        decodes, mean = self._decodes(request)
        best = min(decodes, key=lambda e: self._local_cost(e, request, mean), default=None)
        if best is None or self._local_cost(best, request, mean) > self._remote_cost(prefill[0], request):
            return None
        return best

    def _sooner_than_split(self, request: RequestContext) -> Endpoint | None:
        prefill = self._scheduler.preview(InstanceRole.PREFILL, request)
        if not prefill:
            return None
        now, least, chosen = request.now, self._remote_cost(prefill[0], request), None
        decodes, mean = self._decodes(request)
        for decode in decodes:
            requests, cost = max(mean, decode.requests), self._prefill_cost(decode, request)
            step = decode.decode.step(max(1.0, requests), decode.kv_tokens)
            answer_s = max(_LEAST_ANSWER_S, request.output_tokens * step)
            limit = request.tpot_slo or USUAL_TPOT * step
            slack = SLACK_SHARE * (limit - step) * request.output_tokens
            local = self._stalls.wait(decode, now) + cost * (1 + DELAY_WEIGHT * requests)
            if requests >= 0.5:
                over = self._stalls.recent(decode, now, answer_s) + cost - slack
                local += STALL_WEIGHT * requests * max(0.0, over)
            if local < least:
                least, chosen = local, (decode, answer_s, cost)
        if chosen is None:
            return None
        best, answer_s, cost = chosen
        self._stalls.add(best, now, answer_s, cost)
        return best

    def _decodes(self, request: RequestContext) -> tuple[list[Endpoint], float]:
        """Return the D that could serve a request alone, and how many requests a D has on average."""
        decodes = self._scheduler.preview(InstanceRole.DECODE, request)
        routable = self._scheduler.some(InstanceRole.DECODE, request.model)
        # The strategy looks for the D that decodes fastest; one with more of the prompt cached can be
        # cheaper.
        most_cached = self._scheduler.most_cached(InstanceRole.DECODE, request)
        decodes += [most_cached] if most_cached is not None else []
        return decodes, sum(request_counts(routable)) / max(1, len(routable))

    def _prefill_cost(self, decode: Endpoint, request: RequestContext) -> float:
        new = request.uncached(decode.holder)
        return self._registry.load.prefill.predict((1.0, new, prefill_pairs(new, request.prompt_tokens)))

    def _local_cost(self, decode: Endpoint, request: RequestContext, mean: float) -> float:
        return self._prefill_cost(decode, request) * (1 + STALL_WEIGHT * max(mean, decode.requests))

    def _remote_cost(self, prefill: Endpoint, request: RequestContext) -> float:
        wait, cost = prefill.prefill.remaining(request.now), prefill.prefill_cost(request)
        return wait + (1 + WORK_WEIGHT) * cost + self._registry.load.transfer
