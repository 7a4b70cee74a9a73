"""The first half of a split request: a P that prefills it, or another one when that fails."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..admission.controller import AdmissionController
from ..admission.queue import Ticket
from ..config import SchedulerConfig
from ..connectors import Attempt, ConnectorFailed, Connectors, Handoff, Order
from ..fleet.endpoint import Endpoint, Reservation
from ..handoff.interfaces import (
    AbortLeg,
    AskPrefill,
    LocalShortage,
    PrefillAnswer,
    PrefillFailed,
    PrefillLeg,
    PrefillNotSent,
)
from ..handoff.pending import PendingHandoff
from ..models import InstanceRole
from ..records.decision import OK, Decision
from ..records.decision import Attempt as NotedAttempt
from ..request.api import RESPONSES
from ..request.body import JsonBody
from ..request.context import RequestContext
from ..request.errors import Reject, reject
from ..scheduler import Scheduler
from ..scheduler.kv_source import KvSources
from ..telemetry import Telemetry
from ..telemetry.pace import Pace
from ..tracing import current
from .attempts import KEY_REFUSED, Failure, failure_of_status
from .local_errors import LocalErrors
from .lost import MAX_LOSSES, PAUSE_S, LostPrompts
from .share_limit import ShareLimit
from .time_limits import handoff_deadline
from .together import Beside
from .tokens_once import tokens_once

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WithoutHandoff:
    """Decode is to prefill the request itself.

    ``failed`` says whether that is because P failed, which only a share of the requests may have. Else P has
    refused the request (``refused_by``, with an HTTP ``status``) or has nothing to hand over, or it is the
    connector that failed.
    """

    failed: bool = True
    refused_by: Endpoint | None = None
    status: int = 0
    losses: int = 0
    """Connections that the request has lost at P after it was delivered."""
    errors: tuple[Endpoint, ...] = ()
    """P that have answered 500."""


@dataclass(frozen=True, slots=True)
class AskedLater:
    """D is to ask for the prefill (``Order.DECODE_FIRST``): until then nothing is sent to P."""

    attempt: Attempt
    reservation: Reservation
    """What it will take on P, as far as is known now."""
    noted: NotedAttempt
    tried: Tried

    def end(self, now: float) -> None:
        """Note that P is not needed, or chosen anew."""
        self.noted.outcome, self.noted.took = RESERVED, now - self.reservation.at
        self.reservation.release(now)


_STILL_AT_IT = frozenset({"timeout", "hung"})
"""Failures of a P that may go on with the request."""

RESERVED = "reserved"
"""How an attempt is noted that has kept a place at P until D has asked for the prefill."""

_MAY_BE_THE_SOURCE = frozenset({"timeout", "hung", "reset", "status_500"})
"""Failures of a P that was to pull a part of the prompt for which the other instance may be the reason."""

Outcome = PendingHandoff | WithoutHandoff | Reject


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
        self._pace = Pace(clock)
        self._local_errors = LocalErrors(telemetry, config.prefill_listener, clock)

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
        serves = endpoint.routable and endpoint not in unfit and not self._scheduler.saturated(endpoint, now)
        if serves and now - known_at < self._config.health_check_interval:
            return self._registry.reserve(endpoint, context)
        picked = self._scheduler.pick(InstanceRole.PREFILL, context, exclude=unfit)
        if not picked:
            return self._last_resort(context, later.tried)
        later.tried.decision.prefill = self._scheduler.explain(InstanceRole.PREFILL, context)
        return self._registry.reserve(picked[0], context)

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
            strategy, picked = self._scheduler.names[role], reservation.endpoint.id
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
            reservation = self._registry.reserve(endpoint, context)
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
        if tried.only_full and not (picked and not self._scheduler.saturated(picked[0], context.now)):
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
        return self._registry.reserve(picked[0], context) if picked else None

    def _last_resort(self, context: RequestContext, tried: Tried) -> Reservation | None:
        picked = self._scheduler.last_resorts(InstanceRole.PREFILL, tried.excluded, context.model)
        return self._registry.reserve(picked[0], context) if picked else None

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
        endpoint = reservation.endpoint
        tried.endpoints.append(endpoint)
        tried.processes += self._registry.ranks_of(endpoint)
        predicted = reservation.wait + reservation.cost
        noted = tried.decision.prefill_begins(endpoint.id, reservation.at, predicted)
        if reservation.source is not None:
            noted.source, noted.pulled = reservation.source.id, reservation.pulled
        kept = False
        beside: Beside | None = None
        try:
            refused_for = self._lost.refused_for(context.fingerprint, self._clock())
            if refused_for:  # others with its prompt were lost while it has waited
                return lost_twice(math.ceil(refused_for))
            attempt = await self._prepared(reservation, context, body, tried)
            if attempt is None:
                noted.outcome = "no_decode"
                return WithoutHandoff(failed=False)
            if tried.later and not self.can_be_asked:
                noted.outcome = "not_sent"
                self._local_errors.add("metaserver")
                return WithoutHandoff(failed=False)
            if tried.later:
                kept = True
                return AskedLater(attempt, reservation, noted, tried)
            sent = attempt.prefill_body(body)
            if sent is None:
                noted.outcome = "not_split"
                return WithoutHandoff(failed=False)
            if tried.order is Order.TOGETHER:
                beside = Beside(endpoint, attempt, context, headers, tried, self.abort)
            else:
                with self._telemetry.time_prefill(endpoint.id):
                    answer = await leg(endpoint, context.path, headers, sent, attempt)
                return self._answered(reservation, context, attempt, answer, tried, noted)
        except (ConnectorFailed, PrefillFailed) as error:
            return self._unanswered(error, endpoint, context, tried, noted)
        finally:
            if beside is None and not kept:
                self._end(reservation, noted)

        async def send(accepted: Callable[[], None]) -> Outcome | None:
            try:
                with self._telemetry.time_prefill(endpoint.id):
                    answer = await leg(endpoint, context.path, headers, sent, attempt, accepted)
                return self._answered(reservation, context, attempt, answer, tried, noted)
            except (ConnectorFailed, PrefillFailed) as error:
                return self._unanswered(error, endpoint, context, tried, noted)
            finally:
                self._end(reservation, noted)

        return await beside.begin(send)

    def _end(self, reservation: Reservation, noted: NotedAttempt) -> None:
        now = self._clock()
        noted.took = now - reservation.at
        if noted.outcome in _MAY_BE_THE_SOURCE:
            self._pull_ended(reservation, 0)
        reservation.release(now)
        # Soon, since this request itself is about to take a place at decode.
        asyncio.get_running_loop().call_soon(self._admission.wake)

    def _answered(
        self,
        reservation: Reservation,
        context: RequestContext,
        attempt: Attempt,
        answer: PrefillAnswer,
        tried: Tried,
        noted: NotedAttempt,
    ) -> Outcome | None:
        noted.outcome = OK if answer.status == 200 else f"status_{answer.status}"
        if answer.status == 200:
            return self._handed_over(reservation, context, attempt, answer, tried, noted)
        return self._not_200(reservation.endpoint, context.fingerprint, answer, tried)

    def _unanswered(
        self,
        error: ConnectorFailed | PrefillFailed,
        endpoint: Endpoint,
        context: RequestContext,
        tried: Tried,
        noted: NotedAttempt,
    ) -> Outcome | None:
        """Note an attempt that has no answer, or none that its connector could read."""
        if isinstance(error, ConnectorFailed):  # which says nothing of the instance
            noted.outcome = "connector"
            return WithoutHandoff(failed=False)
        if isinstance(error, LocalShortage):
            noted.outcome = "local_resources"
            self._local_errors.add(str(error))
            return reject(503, "The scheduler's machine is short of resources.", "local_resources")
        if isinstance(error, PrefillNotSent):
            noted.outcome = "not_sent"
            self._local_errors.add(str(error))
            tried.only_full = False
            return None
        noted.outcome = str(error)
        self._failed(endpoint, str(error), tried)
        if self.ask is not None:
            for rank in self._registry.ranks_of(endpoint):
                self.ask.forget(rank)
        tried.may_have_written = tried.may_have_written or error.args[0] != "connect"
        lost = self._lose(endpoint, context.fingerprint, tried) if error.lost else None
        # One that is alive may write to D all the same, and later than another one has: when the blocks are
        # another prompt's.
        return no_prefill() if tried.asked is not None and error.args[0] in _STILL_AT_IT else lost

    async def _prepared(
        self, reservation: Reservation, context: RequestContext, body: JsonBody, tried: Tried
    ) -> Attempt | None:
        """Return a new attempt, with what must be known before; ``None`` if it cannot be made.

        That is so if there is no D that it needs, or no way to say which rank of P or D is meant.
        """
        endpoint, source = reservation.endpoint, reservation.source
        pulled_from = None
        if source is not None:
            pulled_from = self._connectors.peer(source.instance, source.host, source.rank)
        if tried.asked is not None:
            peer = self._connectors.peer(endpoint.instance, endpoint.host, endpoint.rank)
            return tried.asked.by(peer, pulled_from)
        attempt = self._connectors.attempt(
            endpoint.instance,
            endpoint.host,
            rank=endpoint.rank,
            speaks=endpoint.speaks,
            takes_token_ids=endpoint.takes_token_ids,
            token_ids=self._config.tokenize_once and tokens_once(body),
        )
        if pulled_from is not None:
            attempt = attempt.pulling_from(pulled_from)
        tried.decode, tried.order = None, attempt.order()
        tried.later = tried.order is Order.DECODE_FIRST
        if tried.order is Order.TOWARDS_DECODE:
            context.at(self._clock())
            picked = self._scheduler.pick(InstanceRole.DECODE, context, beside=endpoint)
            if not picked:
                return None
            tried.decode = decode = picked[0]
            tried.decision.decode = self._scheduler.explain(InstanceRole.DECODE, context)
            attempt = attempt.towards(self._connectors.peer(decode.instance, decode.host, decode.rank))
        question = attempt.question()
        if question is not None:
            if self.ask is None:
                raise PrefillNotSent("nobody asks its connector's question")
            attempt = attempt.knowing(await self.ask(endpoint, question, attempt))
        if body.api is RESPONSES and attempt.names_rank():  # vLLM reads no rank there
            return None
        return attempt

    def _handed_over(
        self,
        reservation: Reservation,
        context: RequestContext,
        attempt: Attempt,
        answer: PrefillAnswer,
        tried: Tried,
        noted: NotedAttempt,
    ) -> Outcome | None:
        endpoint = reservation.endpoint
        try:
            handoff = attempt.handoff(answer.body)
        except ConnectorFailed:
            self._telemetry.handoff_stranded(endpoint.id)  # there may be one
            raise
        if handoff is not None:
            self._registry.succeeded(endpoint)
            self._registry.speaks(endpoint, handoff.protocol, handoff.takes_token_ids)
            self._learn(reservation, context, handoff)
            deadline = handoff_deadline(self._config, self._clock(), handoff.lease)
            return PendingHandoff(
                handoff, endpoint, attempt, deadline, context.model, tried.decode, tried.losses
            )
        if attempt.ended(answer.body):
            self._registry.succeeded(endpoint)
            return WithoutHandoff(failed=False)
        noted.outcome = "no_handoff"
        if (trace := current.get()) is not None:
            trace.prefill_useless("no_handoff")
        words = (
            "no hand-off in its answer: has it a --kv-transfer-config, with the connector that is set here?"
        )
        if self._pace.due("no_handoff"):
            log.warning("%s: %s (logged at most once a minute)", endpoint.id, words)
        self._failed(endpoint, "no_handoff", tried, words)
        return None

    def _not_200(
        self, endpoint: Endpoint, fingerprint: int, answer: PrefillAnswer, tried: Tried
    ) -> Outcome | None:
        failure = failure_of_status(answer.status)
        if failure is Failure.OVERLOADED:
            self._telemetry.prefill_failed(endpoint.id, f"status_{answer.status}")
            self._registry.overloaded(endpoint, self._clock(), answer.retry_after)
            return None
        own_key = answer.status in KEY_REFUSED and endpoint.instance.api_key is not None
        if failure is not Failure.REFUSED or own_key:
            tried.may_have_written = True
            if answer.status == 500:
                self._errored(endpoint, fingerprint, tried)
            else:
                self._failed(endpoint, f"status_{answer.status}", tried)
            return self._lose(endpoint, fingerprint, tried) if b"EngineCore" in answer.body else None
        tried.only_full = False
        if not self._decode_may_not_prefill(tried):
            # P was asked for one token, not streamed: only D sees the request as the client wrote it.
            return WithoutHandoff(False, endpoint, answer.status)
        agreed = tried.refusal is not None and tried.refusal.status == answer.status
        kept = {**answer.headers, "content-type": answer.content_type}
        tried.refusal = Reject(answer.status, answer.body, kept, "prefill_4xx")
        return tried.refusal if agreed else None

    def _lose(self, endpoint: Endpoint, fingerprint: int, tried: Tried) -> Reject | None:
        """Count a request that was delivered and lost; return the answer if it must not be tried again.

        That is so as well if others with its prompt have taken the second instance meanwhile.
        """
        tried.losses += 1
        now = self._clock()
        self._lost.lost(fingerprint, endpoint.instance.instance_id, now)
        refused_for = self._lost.refused_for(fingerprint, now)
        if tried.losses < MAX_LOSSES and not refused_for:
            return None
        return lost_twice(math.ceil(refused_for) or int(PAUSE_S))

    def _errored(self, endpoint: Endpoint, fingerprint: int, tried: Tried) -> None:
        """Count a 500: a bug of the instance's, or the first sign that it dies, or due to the request."""
        tried.only_full = False
        now = self._clock()
        self._telemetry.prefill_failed(endpoint.id, "status_500")
        self._lost.suspect(fingerprint, endpoint.instance.instance_id, now)
        self._registry.errored(endpoint, tried.errors, "prefill: status_500", now)
        tried.errors += (endpoint,)

    def _failed(self, endpoint: Endpoint, reason: str, tried: Tried, words: str = "") -> None:
        tried.only_full = False
        self._telemetry.prefill_failed(endpoint.id, reason)
        self._registry.failed(endpoint, f"prefill: {words or reason}", self._clock())

    def _pull_ended(self, reservation: Reservation, cached: int | None) -> None:
        """Note how a prefill has ended that was to pull, and what P says that was cached of the prompt."""
        if reservation.source is not None:
            paid = self._sources.ended(reservation, cached, self._clock())
            self._telemetry.prefix_pulled(reservation.source.id, reservation.pulled, paid)

    def _learn(self, reservation: Reservation, context: RequestContext, handoff: Handoff) -> None:
        """Learn from a prefill how long it took, and how long the prompt was."""
        tokens, now = handoff.prompt_tokens, self._clock()
        self._pull_ended(reservation, handoff.cached_tokens)
        if tokens is None or tokens < 1:
            return
        took = now - reservation.at
        if took > 0:
            predicted = reservation.wait + reservation.cost
            self._telemetry.prefill_predicted(reservation.endpoint.id, predicted / took)
        self._telemetry.prompt_read(tokens, reservation.cached + reservation.pulled, handoff.cached_tokens)
        self._registry.prefilled(reservation, tokens, handoff.cached_tokens, now)
        self._registry.load.learn_bytes(context.model, context.prompt_bytes, tokens)
        context.counted(tokens)


class Tried:
    """The endpoints that a request was sent to, and what came of it."""

    def __init__(self, losses: int, decision: Decision) -> None:
        self.decision = decision
        """Where all of it is noted."""
        self.endpoints: list[Endpoint] = []
        self.processes: list[Endpoint] = []
        """All ranks of their processes: what has failed on one is not tried on another."""
        self.only_full = True
        self.losses = losses
        self.order = Order.PREFILL_FIRST
        """Of the newest attempt."""
        self.decode: Endpoint | None = None
        """The only D that the newest attempt is for, if it is for one only."""
        self.refusal: Reject | None = None
        self.errors: tuple[Endpoint, ...] = ()
        """Those that have answered 500."""
        self.later = False
        """Whether D is to ask for what the newest attempt would send."""
        self.may_have_written = False
        """Whether a P that has failed may have done the prefill all the same."""
        self.asked: Attempt | None = None
        """The attempt whose D waits for P, and has said where."""
        self.unfit: Sequence[Endpoint] = ()
        """P that the D which waits does not fit."""

    @property
    def excluded(self) -> Sequence[Endpoint]:
        """Those that are not to be tried."""
        return [*self.processes, *self.unfit] if self.unfit else self.processes

    def give_back(self, endpoint: Endpoint) -> None:
        """Let one that has not failed be tried again."""
        self.endpoints.remove(endpoint)
        self.processes = [each for each in self.processes if each.instance is not endpoint.instance]

    def clear(self) -> None:
        """Let all be tried again."""
        self.endpoints.clear()
        self.processes.clear()


def lost_twice(retry_after: int) -> Reject:
    """Return the answer to a request that two instances have lost, or whose prompt others have."""
    message = (
        "Two instances ended while they had this request or one with its prompt, and none has answered it: "
        f"it is not tried again for {retry_after} s."
    )
    return reject(503, message, "lost", retry_after)


def no_prefill() -> Reject:
    """Return the answer to a request that no P can prefill, and D may not."""
    return reject(503, "No prefill instance can serve this request now.", "no_prefill")
