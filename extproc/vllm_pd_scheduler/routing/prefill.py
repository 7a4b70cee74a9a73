"""The first half of a split request: a P that prefills it, or another one when that fails."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..admission.controller import AdmissionController
from ..admission.queue import Ticket
from ..config import SchedulerConfig
from ..connectors import Attempt, ConnectorFailed, Connectors, Order
from ..fleet.endpoint import Endpoint
from ..fleet.reservation import Reservation
from ..handoff.interfaces import (
    AbortLeg,
    AskPrefill,
    PrefillFailed,
    PrefillLeg,
    PrefillNotSent,
)
from ..models import InstanceRole
from ..records.decision import Decision
from ..request.api import RESPONSES
from ..request.body import JsonBody
from ..request.context import RequestContext
from ..request.errors import Reject
from ..scheduler import Scheduler
from ..scheduler.kv_source import KvSources
from ..telemetry import Telemetry
from ..tracing import current
from .local_errors import LocalErrors
from .lost import LostPrompts
from .prefill_ends import PrefillEnds
from .share_limit import ShareLimit
from .together import Beside
from .tokens_once import tokens_linked, tokens_once
from .tried import AskedLater, Outcome, PrefillTry, Ready, Tried, WithoutHandoff, lost_twice, no_prefill

log = logging.getLogger(__name__)


class PrefillStage:
    """Has requests prefilled: on one P after another, up to ``max_retries`` more.

    ``leg`` sends a prefill; without one, decode does all prefills itself. ``ask`` asks P what some protocols
    must know before, ``abort`` ends a leg whose other one has failed. ``local`` counts those that decode does
    because P failed.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        admission: AdmissionController,
        connectors: Connectors,
        telemetry: Telemetry,
        local: ShareLimit,
        lost: LostPrompts,
        clock: Callable[[], float],
    ) -> None:
        self.leg: PrefillLeg | None = None
        self.ask: AskPrefill | None = None
        self.abort: AbortLeg | None = None
        self.can_be_asked = False
        """Whether D can ask for a prefill."""
        self._config = config
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._admission = admission
        self._connectors = connectors
        self._telemetry = telemetry
        self._local = local
        self._lost = lost
        self._clock = clock
        self._sources = KvSources(scheduler, connectors.can_pull)
        self._local_errors = LocalErrors(telemetry, config.prefill_listener, clock)
        self.ends = PrefillEnds(
            config,
            scheduler,
            telemetry,
            lost,
            self._local_errors,
            self._sources,
            self._decode_may_not_prefill,
            self._forget_answers,
            clock,
        )

    async def run(
        self, context: RequestContext, headers: Mapping[str, str], body: JsonBody, decision: Decision
    ) -> Outcome | AskedLater | Beside:
        """Return the hand-off, that D asks for it or prefills itself, or the answer in place of all.

        Where P answers only when D has the blocks, return the prefill that runs.
        """
        if self.leg is None:
            return WithoutHandoff(failed=False)
        tried = Tried(self._lost.spent(context.fingerprint), decision)
        reservation = await self.admit(context, decision)
        if reservation is None and self._decode_may_not_prefill(tried):
            reservation = self._last_resort(context, tried)
        return await self._by_one_after_another(self.leg, reservation, context, headers, body, tried)

    async def asked(
        self,
        later: AskedLater,
        known: Any,
        decode: Endpoint,
        context: RequestContext,
        headers: Mapping[str, str],
        body: JsonBody,
    ) -> Outcome:
        """Do the prefill for which ``decode`` has asked, on the P that is best now.

        ``known`` is what D has said. No D can prefill the request: it waits for P, or another attempt does.
        """
        tried = later.tried
        tried.clear()
        tried.asked, tried.later = later.attempt.knowing(known), False
        if self._scheduler.several_kinds:
            every = self._registry.endpoints(InstanceRole.PREFILL)
            tried.unfit = [each for each in every if self._scheduler.fitting(each, [decode]) == []]
        assert self.leg is not None
        reservation = self._chosen_anew(later, context)
        outcome = await self._by_one_after_another(self.leg, reservation, context, headers, body, tried)
        assert not isinstance(outcome, (AskedLater, Beside))
        return outcome

    def _chosen_anew(self, later: AskedLater, context: RequestContext) -> Reservation | None:
        """Return a reservation on the P that is best now; ``None`` if there is none.

        That is the same one until the fleet's load has been read again: a second choice from what was known
        would take one more turn of the strategy.
        """
        now, endpoint, unfit = self._clock(), later.reservation.endpoint, later.tried.unfit
        known_at = later.reservation.at
        later.end(now)
        context.at(now)
        full = self._scheduler.limits.saturated(endpoint, now)
        serves = endpoint.routable and endpoint not in unfit and not full
        if serves and now - known_at < self._config.health_check_interval:
            return self._registry.work.reserve(endpoint, context)
        picked = self._scheduler.pick(InstanceRole.PREFILL, context, exclude=unfit)
        if not picked:
            return self._last_resort(context, later.tried)
        later.tried.decision.prefill = self._scheduler.explain(InstanceRole.PREFILL, context)
        return self._registry.work.reserve(picked[0], context)

    async def _by_one_after_another(
        self,
        leg: PrefillLeg,
        reservation: Reservation | Reject | None,
        context: RequestContext,
        headers: Mapping[str, str],
        body: JsonBody,
        tried: Tried,
    ) -> Outcome | AskedLater | Beside:
        while isinstance(reservation, Reservation):
            self._sources.take(reservation, context)
            self.trace_pick(reservation, context)
            outcome = await self._attempt(leg, reservation, context, headers, body, tried)
            if outcome is not None:
                return outcome
            reservation = await self._another(context, tried)
        if isinstance(reservation, Reject):
            return reservation
        if tried.refusal is not None:
            return tried.refusal
        if self._config.on_prefill_failure == "fail" or tried.asked is not None:
            return no_prefill()
        return WithoutHandoff(losses=tried.losses, errors=tried.errors)

    def trace_pick(self, reservation: Reservation, context: RequestContext) -> None:
        """Note in the request's trace that a P was chosen."""
        if (trace := current.get()) is not None:
            role, predicted = InstanceRole.PREFILL, reservation.wait + reservation.cost
            strategy, picked = self._scheduler.strategies.names[role], reservation.endpoint.id
            trace.picked(role, strategy, picked, context.now, self._clock(), predicted)

    async def admit(self, context: RequestContext, decision: Decision) -> Reservation | Reject | None:
        """Wait for a P and reserve it; return the refusal, or ``None`` if no P can serve."""
        ticket = Ticket(context, InstanceRole.PREFILL, context.body_bytes)
        try:
            return await self._admission.admit(ticket)
        finally:
            decision.admitted(ticket.choice, ticket.waited)

    async def again(self, before: Beside, body: JsonBody, decode: Endpoint) -> Beside | None:
        """Return a new prefill that runs, for a further attempt at a D; ``None`` if there is none to be had.

        Nothing waits for a P here, since Envoy does not wait long.
        """
        tried, context = before.tried, before.context
        before.stop()
        if not before.failed:
            tried.give_back(before.endpoint)
        while self.leg is not None and tried.refusal is None:
            endpoint = self._beside(decode, context, tried)
            if endpoint is None:
                break
            reservation = self._registry.work.reserve(endpoint, context)
            outcome = await self._attempt(self.leg, reservation, context, before.headers, body, tried)
            if outcome is not None:
                return outcome if isinstance(outcome, Beside) else None
        return None

    def _beside(self, decode: Endpoint, context: RequestContext, tried: Tried) -> Endpoint | None:
        """Return a P that was not tried and fits a D."""
        if len(tried.endpoints) > self._config.max_retries:
            return None
        context.at(self._clock())
        role, exclude = InstanceRole.PREFILL, [*tried.excluded]
        while picked := (
            self._scheduler.pick(role, context, exclude=exclude)
            or self._scheduler.last_resorts(role, exclude, context.model)
        ):
            barred = self._registry.left_out.barred(picked[0], context.now)
            if self._scheduler.fit(picked[0], decode) and decode not in barred:
                return picked[0]
            exclude.append(picked[0])
        return None

    async def _another(self, context: RequestContext, tried: Tried) -> Reservation | Reject | None:
        """Reserve an endpoint that was not tried; ``None`` if there is none.

        The request waits in the queue a second time only if all that were tried were full.
        """
        context.at(self._clock())
        picked: list[Endpoint] = []
        if len(tried.endpoints) <= self._config.max_retries:
            picked = self._scheduler.pick(InstanceRole.PREFILL, context, exclude=tried.excluded)
        if tried.only_full and not (picked and not self._scheduler.limits.saturated(picked[0], context.now)):
            tried.clear()
            return await self._admitted_again(context, tried)
        if len(tried.endpoints) > self._config.max_retries:
            return None
        if picked:
            tried.decision.prefill = self._scheduler.explain(InstanceRole.PREFILL, context)
            self._scheduler.compare_shadow(InstanceRole.PREFILL, context, picked[0], tried.excluded)
        elif self._decode_may_not_prefill(tried):
            # Not where decode may prefill: an ejected one can take its whole time-out, and fail after all.
            return self._last_resort(context, tried)
        return self._registry.work.reserve(picked[0], context) if picked else None

    def _last_resort(self, context: RequestContext, tried: Tried) -> Reservation | None:
        picked = self._scheduler.last_resorts(InstanceRole.PREFILL, tried.excluded, context.model)
        return self._registry.work.reserve(picked[0], context) if picked else None

    async def _admitted_again(self, context: RequestContext, tried: Tried) -> Reservation | Reject | None:
        found = await self.admit(context, tried.decision)
        if isinstance(found, Reservation) and found.endpoint in tried.unfit:
            found.release(self._clock())
            return None
        return found

    def _decode_may_not_prefill(self, tried: Tried) -> bool:
        cannot = tried.asked is not None or tried.order is Order.TOGETHER
        return cannot or self._config.on_prefill_failure == "fail" or self._local.reached

    async def _attempt(
        self,
        leg: PrefillLeg,
        reservation: Reservation,
        context: RequestContext,
        headers: Mapping[str, str],
        body: JsonBody,
        tried: Tried,
    ) -> Outcome | AskedLater | Beside | None:
        """Make one attempt; ``None`` if another instance should be tried."""
        one = self._begun(reservation, context, tried)
        goes_on = False
        try:
            ready = await self._ready(one, body)
            if not isinstance(ready, Ready):
                goes_on = isinstance(ready, AskedLater)
                return ready
            if tried.order is not Order.TOGETHER:
                one.sent_at = self._clock()
                answer = await leg(one.endpoint, context.path, headers, ready.body, ready.attempt)
                return self.ends.answered(one, ready.attempt, answer)
            goes_on = True
        except (ConnectorFailed, PrefillFailed) as error:
            return self.ends.unanswered(one, error)
        finally:
            if not goes_on:
                self._end(one)
        return await self._begin_beside(leg, one, ready, headers)

    async def _begin_beside(
        self, leg: PrefillLeg, one: PrefillTry, ready: Ready, headers: Mapping[str, str]
    ) -> Outcome | Beside | None:
        """Have a prefill run while D has its request."""
        endpoint, context, attempt = one.endpoint, one.context, ready.attempt

        async def send(accepted: Callable[[], None]) -> Outcome | None:
            try:
                one.sent_at = self._clock()
                answer = await leg(endpoint, context.path, headers, ready.body, attempt, accepted)
                return self.ends.answered(one, attempt, answer)
            except (ConnectorFailed, PrefillFailed) as error:
                return self.ends.unanswered(one, error)
            finally:
                self._end(one)

        return await Beside(endpoint, attempt, context, headers, one.tried, self.abort).begin(send)

    def _begun(self, reservation: Reservation, context: RequestContext, tried: Tried) -> PrefillTry:
        """Note that an attempt begins."""
        endpoint = reservation.endpoint
        tried.endpoints.append(endpoint)
        tried.processes += self._registry.ranks_of(endpoint)
        predicted = reservation.wait + reservation.cost
        noted = tried.decision.prefill_begins(endpoint.id, reservation.at, predicted)
        if reservation.source is not None:
            noted.source, noted.pulled = reservation.source.id, reservation.pulled
        return PrefillTry(endpoint, reservation, context, tried, noted)

    def _end(self, one: PrefillTry) -> None:
        self.ends.over(one)
        # Soon, since this request itself is about to take a place at decode.
        asyncio.get_running_loop().call_soon(self._admission.wake)

    def _forget_answers(self, endpoint: Endpoint) -> None:
        """Ask all ranks of a P again before the next request."""
        if self.ask is not None:
            for rank in self._registry.ranks_of(endpoint):
                self.ask.forget(rank)

    def _wants_token_ids(self, body: JsonBody) -> bool:
        """Whether P is to tell a prompt's token ids: D needs them, or what engines tell of their caches."""
        if self._config.tokenize_once and tokens_once(body):
            return True
        return self.ends.on_token_ids is not None and tokens_linked(body)

    async def _ready(self, one: PrefillTry, body: JsonBody) -> Ready | Outcome | AskedLater:
        """Return what P is to be sent, or what comes of the attempt if it is sent nothing now."""
        context, tried, noted = one.context, one.tried, one.noted
        refused_for = self._lost.refused_for(context.fingerprint, self._clock())
        if refused_for:  # others with its prompt were lost while it has waited
            return lost_twice(math.ceil(refused_for))
        attempt = self._made(one, body)
        question = None if attempt is None or tried.asked is not None else attempt.question()
        if attempt is not None and question is not None:
            if self.ask is None:
                raise PrefillNotSent("nobody asks its connector's question")
            attempt = attempt.knowing(await self.ask(one.endpoint, question, attempt))
        # vLLM reads no rank in a request for a response.
        if attempt is None or (tried.asked is None and body.api is RESPONSES and attempt.names_rank()):
            noted.outcome = "no_decode"
            return WithoutHandoff(failed=False)
        if tried.later and not self.can_be_asked:
            noted.outcome = "not_sent"
            self._local_errors.add("metaserver")
            return WithoutHandoff(failed=False)
        if tried.later:
            return AskedLater(attempt, one.reservation, noted, tried)
        sent = attempt.prefill_body(body)
        if sent is None:
            noted.outcome = "not_split"
            return WithoutHandoff(failed=False)
        return Ready(attempt, sent)

    def _made(self, one: PrefillTry, body: JsonBody) -> Attempt | None:
        """Return a new attempt; ``None`` if there is no D that it needs."""
        endpoint, source, tried = one.endpoint, one.reservation.source, one.tried
        pulled_from = None if source is None else self._connectors.peer(source)
        if tried.asked is not None:
            return tried.asked.by(self._connectors.peer(endpoint), pulled_from)
        attempt = self._connectors.attempt(endpoint, token_ids=self._wants_token_ids(body))
        if pulled_from is not None:
            attempt = attempt.pulling_from(pulled_from)
        tried.decode, tried.order = None, attempt.order()
        tried.later = tried.order is Order.DECODE_FIRST
        if tried.order is not Order.TOWARDS_DECODE:
            return attempt
        context = one.context
        context.at(self._clock())
        picked = self._scheduler.pick(InstanceRole.DECODE, context, beside=endpoint)
        if not picked:
            return None
        tried.decode = decode = picked[0]
        tried.decision.decode = self._scheduler.explain(InstanceRole.DECODE, context)
        return attempt.towards(self._connectors.peer(decode))
