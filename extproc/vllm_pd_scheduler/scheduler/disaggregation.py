"""Whether a request's prefill goes to a prefill instance, or decode does it itself."""

from __future__ import annotations

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..prediction.load_model import prefill_pairs
from ..request.context import RequestContext
from ..strategies.predicted_latency import WORK_WEIGHT
from . import Scheduler

STALL_WEIGHT = 5.0
"""What a second counts in which running answers stand still, beside one before an answer begins."""


class Disaggregation:
    """Decides by the setting ``disaggregation``: always, never, from a prompt length on, or by cost.

    By cost (``auto``), what counts is the delay for everybody, in predicted seconds. On decode instance D the
    prefill of the tokens that D has not cached stalls D's running answers for as long as it takes::

        local  = cost * (1 + STALL_WEIGHT * requests on D, or on average if that is more)
        remote = left on P + (1 + WORK_WEIGHT) * cost on P + KV transfer

    so that a long prompt goes to P, and a short one, or one that D has cached, stays on a D with little to
    do or when P has a queue. The average counts since a D that is idle now will not stay so meanwhile.
    """

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler) -> None:
        self._setting = config.disaggregation
        self._scheduler = scheduler
        self._registry = scheduler.registry

    def local(self, request: RequestContext) -> Endpoint | None:
        """Return the decode instance that should serve a request alone, or ``None`` if it is to be split."""
        if self._setting == "always":
            return None
        if self._setting == "auto":
            return self._cheapest(request)
        if self._setting == "never" or request.prompt_tokens < self._setting:
            return next(iter(self._scheduler.preview(InstanceRole.DECODE, request)), None)
        return None

    def _cheapest(self, request: RequestContext) -> Endpoint | None:
        prefill = self._scheduler.preview(InstanceRole.PREFILL, request)
        if not prefill:
            return None
        decodes = self._scheduler.preview(InstanceRole.DECODE, request)
        routable = self._registry.routable(InstanceRole.DECODE)
        mean = sum(e.requests for e in routable) / max(1, len(routable))
        # The one with the longest prefix may be better than the one that decodes fastest.
        caches = [e for e in routable if e.holder in request.cached]
        decodes += [max(caches, key=lambda e: request.cached[e.holder])] if caches else []
        best = min(decodes, key=lambda e: self._local_cost(e, request, mean), default=None)
        if best is None or self._local_cost(best, request, mean) > self._remote_cost(prefill[0], request):
            return None
        return best

    def _local_cost(self, decode: Endpoint, request: RequestContext, mean: float) -> float:
        new = request.uncached(decode.holder)
        cost = self._registry.load.prefill.predict((1.0, new, prefill_pairs(new, request.prompt_tokens)))
        return cost * (1 + STALL_WEIGHT * max(mean, decode.requests))

    def _remote_cost(self, prefill: Endpoint, request: RequestContext) -> float:
        left, cost = prefill.prefill.left(request.now), prefill.prefill_cost(request)
        return left + (1 + WORK_WEIGHT) * cost + self._registry.load.transfer
