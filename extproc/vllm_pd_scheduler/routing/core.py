"""The way of one request: read it, have P prefill it, choose D, and give back what was reserved."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..admission.controller import AdmissionController
from ..admission.queue import Ticket
from ..config import SchedulerConfig
from ..connectors import ConnectorFailed, Connectors
from ..fleet.endpoint import Endpoint
from ..handoff.pending import PendingHandoff
from ..models import InstanceRole
from ..prediction.load_model import prefill_pairs
from ..records.decision import MAX_TEXT, Decision
from ..records.decisions import Decisions
from ..records.explained import in_a_line
from ..records.recording import Recording
from ..request import headers as names
from ..request.api import APIS
from ..request.body import JsonBody, strip_handoff
from ..request.context import RequestContext
from ..request.errors import BodyError, OwnAnswer, Reject, reject
from ..request.objectives import Objectives
from ..request.passed_body import asks_for_stream, named_model
from ..request.path import HEALTH_PATH, PublicPaths
from ..request.reader import HeaderError, RequestReader
from ..request.rewrites import Rewrites
from ..scheduler import Scheduler
from ..scheduler.disaggregation import Disaggregation
from ..telemetry import Ending, Served, Telemetry, log_lines
from ..tracing import current
from .catalog import Catalog
from .forward import Forward
from .in_flight import Later, RequestsInFlight
from .prefill import PrefillStage, WithoutHandoff, lost_twice, no_prefill
from .renaming import Renaming
from .response_ids import ResponseIds
from .share_limit import ShareLimit
from .sidecar import SidecarPrefill
from .time_limits import first_byte_timeout, passed_timeout
from .turns import Turns

if TYPE_CHECKING:
    from ..tracing.request_tracer import RequestTracer

log = logging.getLogger(__name__)


class NoPartner(Exception):
    """No D that fits P can serve any more: its hand-off cannot be used."""


class RoutingCore:
    """Decides where requests go. The only I/O is that of the prefill leg (``prefill.leg``).

    ``in_flight`` keeps what was sent to decode until its answer has ended. ``tracer`` begins the trace of
    each request, if tracing is on.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        admission: AdmissionController,
        connectors: Connectors,
        telemetry: Telemetry,
        decisions: Decisions,
        recording: Recording,
        clock: Callable[[], float],
        later: Later,
    ) -> None:
        self.tracer: RequestTracer | None = None
        self.config = config
        self.registry = scheduler.registry
        self.connectors = connectors
        self.telemetry = telemetry
        self._decisions = decisions
        self._recording = recording
        self._scheduler = scheduler
        self._admission = admission
        self._clock = clock
        self._reader = RequestReader(config, self.registry.load)
        self._public = PublicPaths(config.public_paths)
        self._disaggregation = Disaggregation(config, scheduler)
        self._turns = Turns()
        self.rewrites = Rewrites()
        self.catalog = Catalog(scheduler, self.rewrites, clock)
        self._renaming = Renaming(self.rewrites, scheduler, self._reader, telemetry)
        self._local = ShareLimit(config.max_local_prefill_share)
        self._response_ids = ResponseIds(self.registry)
        self.in_flight = RequestsInFlight(self.registry, telemetry, recording, clock, admission.wake, later)
        self.prefill = PrefillStage(
            config, scheduler, admission, connectors, telemetry, self._local, self.in_flight.lost, clock
        )
        self._sidecar = SidecarPrefill(config, self.prefill, self.registry, self.in_flight.lost, clock)

    @property
    def objectives(self) -> Objectives:
        """The priorities of requests that name an objective."""
        return self._reader.objectives

    def reconfigured(self) -> None:
        """Take what is not read at each request as it is configured now."""
        self._local.share = self.config.max_local_prefill_share
        self._admission.wake()

    async def route(
        self, headers: Mapping[str, str], body: bytes, subset: frozenset[str] | None = None
    ) -> Forward | Reject:
        """Decide where a request goes, prefilling it first where that is possible.

        ``subset`` limits to which D it may go (see :attr:`.RequestContext.subset`).

        ``headers`` has lower-case names, with the pseudo headers ``:method`` and ``:path``. Cancelling
        the call cancels the prefill.
        """
        log_lines.request_id.set(headers.get(names.REQUEST_ID, ""))
        path = headers.get(":path", "/").partition("?")[0]
        decision = Decision(self._clock(), headers.get(names.REQUEST_ID, "")[:MAX_TEXT], path[:MAX_TEXT])
        outcome: Forward | Reject
        trace = None if self.tracer is None else self.tracer.begin(headers, self._clock())
        try:
            if path in APIS and path in self._public and headers.get(":method") == "POST":
                parsed = await self._turns.take(JsonBody.read(body, APIS[path]))
                del body  # it is another one if a hand-off was cut out of it
                if self.rewrites.active:
                    parsed = await self._turns.take(self._renaming.renamed(headers, parsed, decision))
                outcome = await self._split(path, headers, parsed, subset, decision)
                if isinstance(outcome, Forward):
                    self._response_ids.name(outcome, parsed, self.config.max_body_bytes)
            elif (own := self._own_answer(path, headers)) is not None:
                if trace is not None:
                    trace.rejected(own.status, own.reason, self._clock())
                return own
            elif path not in self._public:
                outcome = reject(404, f"There is no {path} here: it is not in public_paths.", "not_public")
            else:
                outcome = await self._passed(path, headers, body, subset, decision)
        except BodyError as error:
            outcome = reject(400, str(error), "bad_body")
        except HeaderError as error:
            outcome = reject(400, str(error), "bad_header")
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                decision.ending = Ending.LEFT
            self._decisions.add(decision)
            if trace is not None:
                trace.broken_off(error, self._clock())
            raise
        self._decisions.add(decision)
        if isinstance(outcome, Reject):
            self._note_refusal(outcome, decision)
            if trace is not None:
                trace.rejected(outcome.status, outcome.reason, self._clock())
        if headers.get(names.EXPLAIN) == "1" and self.config.explain_header:
            outcome = _explained(outcome, decision)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%.200s: %s", path, outcome)
        return outcome

    def _own_answer(self, path: str, headers: Mapping[str, str]) -> OwnAnswer | None:
        """Return the answer to a question about models that instances would answer for themselves alone."""
        public = path == HEALTH_PATH or path in self._public
        return self.catalog.own_answer(path, headers) if public else None

    def refused(self, headers: Mapping[str, str], answer: Reject) -> None:
        """Note a request that was refused before it was routed."""
        path = headers.get(":path", "/").partition("?")[0]
        decision = Decision(self._clock(), headers.get(names.REQUEST_ID, "")[:MAX_TEXT], path[:MAX_TEXT])
        self._decisions.add(decision)
        self._note_refusal(answer, decision)

    def _note_refusal(self, answer: Reject, decision: Decision) -> None:
        self.telemetry.rejected(answer.status, answer.reason)
        decision.refused(answer.status, answer.reason, self._clock())

    async def _passed(
        self,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        subset: frozenset[str] | None,
        decision: Decision,
    ) -> Forward | Reject:
        """Send a request to decode as it is, but for a hand-off of the client's."""
        clean = await self._turns.take(strip_handoff(body))
        stream = await self._turns.take(asks_for_stream(clean))
        model = None
        if self._scheduler.tells_apart or self.rewrites.active:
            model = await self._turns.take(named_model(clean))
            if model is not None and self.rewrites.active:
                parsed = await self._turns.take(JsonBody.read(clean))
                renamed = await self._turns.take(self._renaming.renamed(headers, parsed, decision))
                if renamed is not parsed:
                    clean, model = renamed.raw, renamed.get("model")
            decision.model = model and model[:MAX_TEXT]
            refusal = await self.catalog.refusal(decision.asked_model, model)
            if refusal is not None:
                return refusal
        context = self._reader.passed(path, headers, clean, stream, self._clock(), model)
        context.limited_to(subset)
        refused_for = self.in_flight.lost.refused_for(context.fingerprint, context.now)
        if refused_for:
            return lost_twice(math.ceil(refused_for))
        limit = passed_timeout(self.config, len(body), stream, self.in_flight.patience.factor)
        changed = None if clean is body else clean
        keeper = self._response_ids.keeper_of_path(path)
        return self._to_decode(
            context, changed, Served.PASSED, limit, decision, keeper, bound=keeper is not None
        )

    async def _split(
        self,
        path: str,
        headers: Mapping[str, str],
        body: JsonBody,
        subset: frozenset[str] | None,
        decision: Decision,
    ) -> Forward | Reject:
        reads_prefixes = self._scheduler.reads_prefixes or self._recording.readers > 0
        reading = self._reader.read(path, headers, body, self._clock(), prefixes=reads_prefixes)
        context = await self._turns.take(reading)
        context.limited_to(subset)
        decision.model = context.model and context.model[:MAX_TEXT]
        decision.stream, decision.prompt_tokens = context.stream, context.prompt_tokens
        if context.model is not None and (trace := current.get()) is not None:
            trace.asks_for(decision.asked_model or context.model)
        refused_for = self.in_flight.lost.refused_for(context.fingerprint, context.now)
        if refused_for:
            return lost_twice(math.ceil(refused_for))
        if not self._scheduler.can_serve(InstanceRole.DECODE, context.model, subset):
            refusal = await self.catalog.refusal(decision.asked_model, context.model)
            can_serve = refusal is None and self._scheduler.can_serve(
                InstanceRole.DECODE, context.model, subset
            )
            if not can_serve:
                return refusal or self._no_decode(context, decision)
        changed = body.raw if body.changed else None
        limit = first_byte_timeout(self.config, body, self.in_flight.patience.factor)
        # A hand-off of one model is a wrong text at a D of another. Without a name nobody would notice.
        named = context.model or self._scheduler.one_model()
        if not (named and self.connectors.can_split(body)):
            keeper = self._response_ids.keeper(body.get("previous_response_id"))
            return await self._whole(
                context, changed, Served.WHOLE, limit, decision, keeper, bound=keeper is not None
            )
        alone = self._disaggregation.local_endpoint(context)
        if alone is not None:
            return await self._whole(context, changed, Served.ALONE, limit, decision, alone)
        if self.config.prefill_leg == "sidecar":
            return await self._by_sidecar(context, changed, limit, decision)
        prefilled = await self.prefill.run(context, headers, body, decision)
        if isinstance(prefilled, Reject):
            return prefilled
        if isinstance(prefilled, WithoutHandoff):
            return self._without_handoff(context, changed, limit, prefilled, decision)
        self._local.take(False)
        left = prefilled.deadline - self._clock()
        if left <= 0:
            # The event loop was held up. P's blocks may be another prompt's by now.
            self.telemetry.handoff_late(prefilled.prefill.id)
            return self._to_decode(context, changed, Served.LOCAL, limit, decision)
        try:
            return self._with_handoff(context, body, prefilled, left, decision)
        except Exception:
            self.in_flight.free(prefilled)
            raise

    async def _by_sidecar(
        self, context: RequestContext, body: bytes | None, limit: float, decision: Decision
    ) -> Forward | Reject:
        """Send a request to a D whose sidecar has it prefilled on the P that is chosen here."""
        claim = await self._sidecar.choose(context, decision)
        if isinstance(claim, Reject):
            return claim
        if isinstance(claim, WithoutHandoff):
            return self._without_handoff(context, body, limit, claim, decision)
        self._local.take(False)
        try:
            # The first byte comes after the prefill.
            forward = self._to_decode(
                context,
                body,
                Served.SPLIT,
                limit + self.config.prefill_timeout,
                decision,
                beside=claim.endpoint,
            )
        except NoPartner:
            claim.end(self._clock())
            return self._to_decode(context, body, Served.LOCAL, limit, decision)
        except Exception:
            claim.end(self._clock())
            raise
        if isinstance(forward, Reject):
            claim.end(self._clock())
        else:
            forward.only = self._scheduler.fitting(claim.endpoint, forward.decode)
            self.in_flight.claimed(forward, claim)
        return forward

    def _without_handoff(
        self,
        context: RequestContext,
        body: bytes | None,
        limit: float | None,
        why: WithoutHandoff,
        decision: Decision,
    ) -> Forward | Reject:
        """Send a request to decode, which prefills it too: P has failed or refused it."""
        if not self._local.take(why.failed):
            return no_prefill()
        forward = self._to_decode(context, body, Served.LOCAL, limit, decision)
        if isinstance(forward, Forward):
            forward.refused_by, forward.refused_status = why.refused_by, why.status
            forward.losses, forward.errors = max(forward.losses, why.losses), why.errors
        return forward

    def _with_handoff(
        self,
        context: RequestContext,
        body: JsonBody,
        prefilled: PendingHandoff,
        left: float,
        decision: Decision,
    ) -> Forward | Reject:
        """Send a request to decode with its hand-off, which may be used for ``left`` seconds more."""
        changed, only = body.raw if body.changed else None, prefilled.decode
        try:
            splice = prefilled.attempt.splice(body, prefilled.handoff)
            # Else Envoy would answer 413 in D's place.
            usable = splice is None or splice.at + len(splice.text) <= self.config.max_body_bytes
            usable = usable and (only is None or only.routable)
        except ConnectorFailed:
            usable = False
        if usable:
            limit = first_byte_timeout(self.config, body, self.in_flight.patience.factor, left)
            try:
                forward = self._to_decode(
                    context,
                    changed,
                    Served.SPLIT,
                    limit,
                    decision,
                    only,
                    only,
                    bound=only is not None,
                    beside=prefilled.prefill,
                )
            except NoPartner:
                usable = False
        if not usable:
            self.in_flight.free(prefilled)
            limit = first_byte_timeout(self.config, body, self.in_flight.patience.factor)
            return self._to_decode(context, changed, Served.LOCAL, limit, decision)
        if isinstance(forward, Reject):
            self.in_flight.free(prefilled)
        else:
            fitting = self._scheduler.fitting(prefilled.prefill, forward.decode)
            forward.only = fitting if only is None else [only]
            forward.splice, forward.pending = splice, prefilled
            forward.losses = prefilled.losses
            if prefilled.handoff.pinned:
                prefilled.prefill.keep_handoff()
        return forward

    async def _whole(
        self,
        context: RequestContext,
        body: bytes | None,
        served: Served,
        limit: float | None,
        decision: Decision,
        preferred: Endpoint | None = None,
        bound: bool = False,
    ) -> Forward | Reject:
        """Send a request to decode alone, as soon as there is room; see :meth:`_to_decode`."""
        ticket = Ticket(context, InstanceRole.DECODE, len(body or b"") or context.body_bytes)
        try:
            outcome = await self._admission.admit(ticket)
        finally:
            decision.waited = ticket.waited
        if isinstance(outcome, Reject):
            return outcome
        own = None
        if outcome is not None:  # it has kept the place until now
            outcome.release()
            own, decision.decode = outcome.endpoint, ticket.choice
        refused_for = self.in_flight.lost.refused_for(context.fingerprint, self._clock())
        if refused_for:  # others with its prompt were lost while it has waited
            return lost_twice(math.ceil(refused_for))
        return self._to_decode(context, body, served, limit, decision, preferred or own, own, bound)

    def _to_decode(
        self,
        context: RequestContext,
        body: bytes | None,
        served: Served,
        limit: float | None,
        decision: Decision,
        preferred: Endpoint | None = None,
        own: Endpoint | None = None,
        bound: bool = False,
        beside: Endpoint | None = None,
    ) -> Forward | Reject:
        """Send a request to ``preferred``, if that has room, else to the strategy's choice.

        ``own`` is what the strategy chose for it, if it was asked already. A request that is ``bound`` goes
        to ``preferred`` as it is. ``beside`` is the P that hands it over: only a D that fits it gets the
        hand-off, and further attempts, which have none, may go to all.
        """
        context.at(self._clock())
        pick = self._scheduler.preview if preferred else self._scheduler.pick
        count = 1 + self.config.max_retries
        picked = pick(InstanceRole.DECODE, context, count=count, beside=beside)
        choice = self._scheduler.explain(InstanceRole.DECODE, context)
        now = context.now
        outside = self._scheduler.outside(InstanceRole.DECODE, context.subset)
        if preferred in outside:
            preferred = None
        has_room = preferred is not None and (
            bound or (preferred.routable and not self._scheduler.saturated(preferred, now))
        )
        if preferred is not None and has_room:
            picked = [preferred, *(e for e in picked if e is not preferred)]
            if preferred is not own:  # else that was another pick
                decision.decode = choice
        else:
            own, decision.decode = picked[0] if picked else None, choice
        if not picked and beside is not None and self._scheduler.several_kinds:
            raise NoPartner
        picked = picked or self._scheduler.last_resorts(InstanceRole.DECODE, outside, context.model)
        if not picked:
            return self._no_decode(context, decision)
        decode = self._in_turn(context, picked[:count], count)
        if decode[0] is own:  # not what another rule has chosen
            self._scheduler.compare_shadow(InstanceRole.DECODE, context, own, beside=beside)
        self.telemetry.forwarded(decode[0].id, served)
        predicted_ttft = self._predicted_ttft(context, decision, served, decode[0])
        trace = current.get()
        if trace is not None:
            strategy = self._scheduler.names[InstanceRole.DECODE]
            trace.picked(InstanceRole.DECODE, strategy, decode[0].id, context.now, self._clock())
        removed = [n for n in context.headers if n.startswith(names.STEERING_PREFIXES)]
        reservation = self.registry.reserve(decode[0], context)
        forward = self.in_flight.start(decode, reservation, body, limit, removed, decision)
        forward.comparable, forward.prompt = served is not Served.PASSED, context.fingerprint
        forward.stream, forward.losses = context.stream, self.in_flight.lost.spent(context.fingerprint)
        forward.request_id = context.request_id
        forward.served = served
        if served is not Served.PASSED:
            forward.recorded = self._recording.begin(context)
        decision.id, decision.served, decision.decode_to = forward.id, served, decode
        decision.prompt_tokens = context.prompt_tokens
        decision.predicted_ttft = predicted_ttft
        if trace is not None:
            forward.trace = trace
            tokens, first = context.prompt_tokens, decode[0]
            trace.decode_sent(forward.id, served, tokens, first.id, first.url, self._clock())
        return forward

    def _predicted_ttft(
        self, context: RequestContext, decision: Decision, served: Served, decode: Endpoint
    ) -> float | None:
        """Return predicted seconds from the arrival to the first token: of P, when that was chosen."""
        load, prompt = self.registry.load, context.prompt_tokens
        if served is Served.SPLIT:
            prefill = decision.prefill_attempts[-1]
            before = prefill.at - decision.arrived + (prefill.predicted or 0.0) + load.transfer
        elif prompt:
            new = context.uncached(decode.holder)
            cost = load.prefill.predict((1.0, new, prefill_pairs(new, prompt)))
            before = context.now - decision.arrived + cost
        else:
            return None
        return before + decode.decode.step(decode.requests + 1, decode.kv_tokens + prompt)

    def _in_turn(self, context: RequestContext, picked: list[Endpoint], count: int) -> list[Endpoint]:
        """Return up to ``count`` that Envoy tries one after another: those picked, then the last resorts."""
        # A further attempt has the same headers: same key only.
        key = picked[0].instance.api_key
        found = [endpoint for endpoint in picked if endpoint.instance.api_key == key]
        if len(found) < count:
            taken = [*picked, *self._scheduler.outside(InstanceRole.DECODE, context.subset)]
            others = self._scheduler.last_resorts(InstanceRole.DECODE, taken, context.model)
            found += [endpoint for endpoint in others if endpoint.instance.api_key == key]
        return found[:count]

    def _no_decode(self, context: RequestContext, decision: Decision) -> Reject:
        unknown = self.catalog.unknown(decision.asked_model, context.model)
        if unknown is not None:  # an adapter may have been unloaded meanwhile
            return unknown
        endpoints = self.registry.endpoints(InstanceRole.DECODE)
        endpoints = [e for e in endpoints if self._scheduler.may_serve(e, context.model)]
        states = ", ".join(f"{e.id} is {e.state}" for e in endpoints[:8]) or "none is registered"
        return reject(503, f"No decode instance can serve this request now: {states}.", "no_decode")


def _explained(outcome: Forward | Reject, decision: Decision) -> Forward | Reject:
    """Return an outcome whose answer says why, for a client that has asked for it."""
    line = in_a_line(decision)
    if isinstance(outcome, Reject):
        return replace(outcome, headers={**outcome.headers, names.DECISION: line})
    outcome.explanation = line
    return outcome
