"""Decides whether a request is split, or a decode instance does its prefill too."""

from __future__ import annotations

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..prediction.load_model import prefill_pairs
from ..request.context import RequestContext
from ..strategies.predicted_latency import WORK_WEIGHT
from . import Scheduler

STALL_WEIGHT = 5.0
"""What a second of prefill on D counts for each answer that runs there, against a second of waiting.

A prefill on D makes all its running answers stand still. The factor keeps a better time to the first token
from being paid for by the time per token: with 3, large fleets had a worse time per token.
"""


class Disaggregation:
    """Decides by the setting ``disaggregation``: always, never, from a prompt length on, or by cost.

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
    """

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler) -> None:
        self._config = config
        self._scheduler = scheduler
        self._registry = scheduler.registry

    def local_endpoint(self, request: RequestContext) -> Endpoint | None:
        """Return the decode instance that should serve a request alone; ``None`` if it is to be split."""
        setting = self._config.disaggregation
        if setting == "always":
            return None
        if setting == "auto":
            return self._cheaper_than_split(request)
        if setting == "never" or request.prompt_tokens < setting:
            return next(iter(self._scheduler.preview(InstanceRole.DECODE, request)), None)
        return None

    def _cheaper_than_split(self, request: RequestContext) -> Endpoint | None:
        prefill = self._scheduler.preview(InstanceRole.PREFILL, request)
        if not prefill:
            return None
        decodes = self._scheduler.preview(InstanceRole.DECODE, request)
        routable = self._scheduler.some(InstanceRole.DECODE, request.model)
        mean = sum(e.requests for e in routable) / max(1, len(routable))
        # The strategy looks for the D that decodes fastest; one with more of the prompt cached can be
        # cheaper.
        most_cached = self._scheduler.most_cached(InstanceRole.DECODE, request)
        decodes += [most_cached] if most_cached is not None else []
        best = min(decodes, key=lambda e: self._local_cost(e, request, mean), default=None)
        if best is None or self._local_cost(best, request, mean) > self._remote_cost(prefill[0], request):
            return None
        return best

    def _local_cost(self, decode: Endpoint, request: RequestContext, mean: float) -> float:
        new = request.uncached(decode.holder)
        cost = self._registry.load.prefill.predict((1.0, new, prefill_pairs(new, request.prompt_tokens)))
        return cost * (1 + STALL_WEIGHT * max(mean, decode.requests))

    def _remote_cost(self, prefill: Endpoint, request: RequestContext) -> float:
        wait, cost = prefill.prefill.remaining(request.now), prefill.prefill_cost(request)
        return wait + (1 + WORK_WEIGHT) * cost + self._registry.load.transfer
