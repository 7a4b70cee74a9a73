"""The first half of a split request: a P that prefills it, or another one when that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from ..admission.controller import AdmissionController
from ..admission.queue import Ticket
from ..config import SchedulerConfig
from ..connectors import Connector, Handoff
from ..fleet.endpoint import Endpoint, Reservation
from ..handoff.interfaces import PrefillAnswer, PrefillFailed, PrefillLeg
from ..handoff.pending import PendingHandoff
from ..models import InstanceRole, PDInstance
from ..request.body import JsonBody
from ..request.context import RequestContext
from ..request.errors import Reject, reject
from ..scheduler import Scheduler
from ..telemetry import Telemetry
from .share_limit import ShareLimit
from .time_limits import handoff_deadline


class PrefillStage:
    """Has requests prefilled: on one P after another, up to ``max_retries`` more.

    ``leg`` sends a prefill; without one, decode does all prefills itself. ``local`` counts those that it
    does because P failed.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        admission: AdmissionController,
        connector: Connector,
        telemetry: Telemetry,
        local: ShareLimit,
        clock: Callable[[], float],
    ) -> None:
        self.leg: PrefillLeg | None = None
        self._config = config
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._admission = admission
        self._connector = connector
        self._telemetry = telemetry
        self._local = local
        self._clock = clock

    async def run(
        self, context: RequestContext, headers: Mapping[str, str], body: JsonBody
    ) -> PendingHandoff | Reject | None:
        """Return the hand-off, or the answer if there will be none; ``None``: decode should prefill."""
        if self.leg is None:
            return None
        tried: list[Endpoint] = []
        leg_body = b""
        outcome = await self._admission.admit(Ticket(context, InstanceRole.PREFILL, context.body_bytes))
        while not isinstance(outcome, Reject):
            if outcome is None:
                break
            tried.append(outcome.endpoint)
            leg_body = leg_body or self._connector.prefill_body(body)
            answer = await self._attempt(self.leg, outcome, context, headers, leg_body)
            if isinstance(answer, Handoff):
                deadline = handoff_deadline(self._config, self._clock())
                return PendingHandoff(answer, tried[-1], deadline, context.model)
            if answer is not None:
                if answer.status == 200:
                    self._telemetry.prefill_failed(tried[-1].id, "no_handoff")
                    return None
                kept = {"content-type": answer.content_type}
                return Reject(answer.status, answer.body, kept, "prefill_4xx")
            outcome = self._another(context, tried)
        else:
            return outcome
        if self._config.on_prefill_failure == "fail":
            return no_prefill()
        return None

    def _another(self, context: RequestContext, tried: list[Endpoint]) -> Reservation | None:
        """Reserve an endpoint that was not tried; the request does not wait in the queue a second time."""
        if len(tried) > self._config.max_retries:
            return None
        context.now = self._clock()
        picked = self._scheduler.pick(InstanceRole.PREFILL, context, exclude=tried)
        if picked:
            self._scheduler.compare_shadow(InstanceRole.PREFILL, context, picked[0], tried)
        elif self._config.on_prefill_failure == "fail" or self._local.reached:
            # Not where decode may prefill: an ejected one can take its whole time-out, and fail after all.
            picked = self._scheduler.last_resorts(InstanceRole.PREFILL, tried)
        return self._registry.reserve(picked[0], context) if picked else None

    async def _attempt(
        self,
        leg: PrefillLeg,
        reservation: Reservation,
        context: RequestContext,
        headers: Mapping[str, str],
        body: bytes,
    ) -> Handoff | PrefillAnswer | None:
        """Make one attempt; ``None`` if another instance should be tried."""
        endpoint = reservation.endpoint
        try:
            with self._telemetry.time_prefill(endpoint.id):
                answer = await leg(endpoint, context.path, headers, body)
        except PrefillFailed as error:
            reason = str(error)
        else:
            if answer.status == 200 or _is_the_clients_fault(answer.status, endpoint.instance):
                self._registry.succeeded(endpoint)
                handoff = self._connector.handoff(answer.body) if answer.status == 200 else None
                if handoff is not None:
                    self._learn(reservation, context, handoff)
                return handoff or answer
            reason = f"status_{answer.status}"
        finally:
            reservation.release(self._clock())
            # Soon, since this request itself is about to take a place at decode.
            asyncio.get_running_loop().call_soon(self._admission.wake)
        self._telemetry.prefill_failed(endpoint.id, reason)
        self._registry.failed(endpoint, f"prefill: {reason}", self._clock())
        return None

    def _learn(self, reservation: Reservation, context: RequestContext, handoff: Handoff) -> None:
        """Learn from a prefill how long it took, and how long the prompt was."""
        tokens, now = handoff.prompt_tokens, self._clock()
        if tokens is None or tokens < 1:
            return
        took = now - reservation.at
        if took > 0:
            predicted = reservation.wait + reservation.cost
            self._telemetry.prefill_predicted(reservation.endpoint.id, predicted / took)
        self._registry.prefilled(reservation, tokens, handoff.cached_tokens, now)
        self._registry.load.learn_bytes(context.model, context.prompt_bytes, tokens)
        context.prompt_tokens = tokens


def no_prefill() -> Reject:
    """Return the answer to a request that no P can prefill, and D may not."""
    return reject(503, "No prefill instance can serve this request now.", "no_prefill")


def _is_the_clients_fault(status: int, instance: PDInstance) -> bool:
    """Whether another instance would answer the same. Timeouts and overload are the instance's own."""
    if status in (401, 403):
        return instance.api_key is None  # else it is our key that it does not take
    return 400 <= status < 500 and status not in (408, 429)
