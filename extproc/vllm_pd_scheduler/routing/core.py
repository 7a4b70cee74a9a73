"""The way of one request: read it, have P prefill it, choose D, and give back what was reserved."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..admission.body_memory import BodyMemory
from ..admission.controller import AdmissionController
from ..config import SchedulerConfig
from ..connectors import ConnectorFailed, Connectors, Splice
from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..records.decision import MAX_TEXT, Decision
from ..records.decisions import Decisions
from ..records.explained import in_a_line
from ..records.recording import Recording
from ..request import headers as names
from ..request.api import APIS
from ..request.body import JsonBody
from ..request.context import RequestContext
from ..request.errors import BodyError, OwnAnswer, Reject, reject
from ..request.objectives import Objectives
from ..request.passed_body import asks_for_stream, named_model
from ..request.path import HEALTH_PATH, PING_PATH, PublicPaths
from ..request.reader import HeaderError, RequestReader
from ..request.rewrites import Rewrites
from ..request.stripping import strip_handoff
from ..scheduler import Scheduler
from ..scheduler.disaggregation import Disaggregation
from ..telemetry import Ending, Served, Telemetry, log_lines
from ..tracing import current
from .catalog import Catalog
from .decode import DecodeStage
from .decode_choice import NoPartner, ToDecode
from .decode_first import DecodeFirst
from .denials import Denials
from .encode import EncodeStage
from .forward import Forward
from .going_on import GoingOn
from .in_flight import RequestsInFlight
from .later import Later
from .prefill import PrefillStage
from .renaming import Renaming
from .response_ids import ResponseIds
from .share_limit import ShareLimit
from .sidecar import SidecarPrefill
from .time_limits import passed_timeout
from .together import Beside
from .tried import AskedLater, WithoutHandoff, lost_twice
from .turns import Turns

if TYPE_CHECKING:
    from ..tracing.request_tracer import RequestTracer

log = logging.getLogger(__name__)


class RoutingCore:
    """Decides where requests go. The only I/O is that of the prefill leg (``prefill.leg``).

    ``in_flight`` keeps what was sent to decode until its answer has ended. ``tracer`` begins the trace of
    each request, if tracing is on. ``name`` is the scheduler's among several.
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
        memory: BodyMemory,
        name: str = "",
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
        self.reader = RequestReader(config, self.registry.load)
        self._public = PublicPaths(config.public_paths)
        self._disaggregation = Disaggregation(config, scheduler)
        self._turns = Turns()
        self.rewrites = Rewrites()
        self.catalog = Catalog(scheduler, self.rewrites, clock)
        self._renaming = Renaming(self.rewrites, scheduler, self.reader, telemetry)
        self._local = ShareLimit(config.max_local_prefill_share)
        self._response_ids = ResponseIds(self.registry)
        self.in_flight = RequestsInFlight(
            self.registry, telemetry, recording, clock, admission.wake, later, name
        )
        self.in_flight.blame.denials = Denials(self.catalog.read_again.soon)
        self.going_on = GoingOn(self.in_flight.lost, clock)
        self.prefill = PrefillStage(
            config, scheduler, admission, connectors, telemetry, self._local, self.in_flight.lost, clock
        )
        self.decode = DecodeStage(
            config,
            scheduler,
            admission,
            connectors,
            telemetry,
            recording,
            self.catalog,
            self.in_flight,
            self._local,
            clock,
        )
        self.encode = EncodeStage(config, scheduler, telemetry, self.in_flight.lost, self._turns, clock)
        self.decode_first = DecodeFirst(
            config,
            self.prefill,
            self.decode,
            self.registry,
            connectors,
            memory,
            telemetry,
            admission.wake,
            clock,
            later,
        )
        self._sidecar = SidecarPrefill(config, self.prefill, self.registry, self.in_flight.lost, clock)

    @property
    def objectives(self) -> Objectives:
        """The priorities of requests that name an objective."""
        return self.reader.objectives

    def fitting(self, prefill: Endpoint, decode: Sequence[Endpoint]) -> Sequence[Endpoint] | None:
        """Return those D that can use what a P hands over; ``None`` if all can."""
        return self._scheduler.fitting(prefill, decode)

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
        if (broken := self.going_on.read(headers)) is not None:
            decision.continues_from, decision.continues_after = broken.decode[:MAX_TEXT], broken.tokens
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
        """Return the answer to a question that instances would answer for themselves alone."""
        public = path in (HEALTH_PATH, PING_PATH) or path in self._public
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
        context = self.reader.passed(path, headers, clean, stream, self._clock(), model)
        context.limited_to(subset)
        refused_for = self.in_flight.lost.refused_for(context.fingerprint, context.now)
        if refused_for:
            return lost_twice(math.ceil(refused_for))
        limit = passed_timeout(self.config, len(body), stream, self.in_flight.patience.factor)
        changed = None if clean is body else clean
        keeper = self._response_ids.keeper_of_path(path)
        bound = keeper is not None
        return self.decode.send(
            ToDecode(context, decision, Served.PASSED, changed, limit, keeper, bound=bound)
        )

    async def _split(
        self,
        path: str,
        headers: Mapping[str, str],
        body: JsonBody,
        subset: frozenset[str] | None,
        decision: Decision,
    ) -> Forward | Reject:
        reads_prefixes = (
            self._scheduler.reads_prefixes or self._recording.readers > 0 or self.connectors.some_can_pull
        )
        reading = self.reader.read(path, headers, body, self._clock(), prefixes=reads_prefixes)
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
                return refusal or self.decode.choice.no_decode(context, decision)
        body = await self.encode.run(context, headers, body, decision)
        outcome = await self._sent(context, headers, body, decision)
        if body.more and isinstance(outcome, Forward):
            self.decode.add_encoded(outcome, body)
        return outcome

    async def _sent(
        self, context: RequestContext, headers: Mapping[str, str], body: JsonBody, decision: Decision
    ) -> Forward | Reject:
        """Send a request that is understood: split, or whole."""
        changed = body.raw if body.changed else None
        # A hand-off of one model is a wrong text at a D of another. Without a name nobody would notice.
        named = context.model or self._scheduler.one_model()
        if not (named and self.connectors.can_split(body)):
            decision.not_split = "connector" if named else "no_model"
            keeper = self._response_ids.keeper(body.get("previous_response_id"))
            way = ToDecode(context, decision, Served.WHOLE, changed, None, keeper, bound=keeper is not None)
            return await self.decode.whole(way)
        alone = self._disaggregation.local_endpoint(context)
        if alone is not None and self.decode.choice.serves_alone(alone):
            decision.not_split = "disaggregation"
            way = ToDecode(context, decision, Served.ALONE, changed, preferred=alone)
            return await self.decode.whole(way)
        if self.config.prefill_leg == "sidecar":
            return await self._by_sidecar(context, changed, decision)
        prefilled = await self.prefill.run(context, headers, body, decision)
        if isinstance(prefilled, Reject):
            return prefilled
        if isinstance(prefilled, Beside):
            self._local.take(False)
            return self.decode.together(context, body, prefilled, decision)
        if isinstance(prefilled, WithoutHandoff):
            return self.decode.without_handoff(context, changed, prefilled, decision)
        self._local.take(False)
        if isinstance(prefilled, AskedLater):
            return self.decode_first.send(context, headers, body, prefilled, decision)
        left = prefilled.deadline - self._clock()
        if left <= 0:
            # The event loop was held up. P's blocks may be another prompt's by now.
            self.telemetry.handoffs.late(prefilled.prefill.id)
            decision.not_split = "late"
            return self.decode.alone(context, changed, decision)
        try:
            return self.decode.with_handoff(context, body, prefilled, left, decision)
        except Exception:
            self.in_flight.handoffs.free(prefilled)
            raise

    async def again(self, request: str, address: str, body: bytes) -> tuple[Beside, Splice] | None:
        """Have a request prefilled anew for a further attempt, at the D that is reached at ``address``.

        Return the prefill that runs, and what goes into the body; ``None`` if nobody prefills it.
        """
        forward = self.in_flight.running(request)
        decode = self.registry.at(InstanceRole.DECODE, address)
        before = None if forward is None else forward.beside
        if forward is None or decode is None or not isinstance(before, Beside):
            return None
        parsed = await self._turns.take(JsonBody.read(body, APIS[before.context.path]))
        beside = await self.prefill.again(before, parsed, decode)
        if beside is None:
            return None
        splice = None
        with contextlib.suppress(ConnectorFailed):
            handoff = beside.attempt.promised()
            splice = None if handoff is None else beside.attempt.splice(parsed, handoff)
        if splice is None or forward.ended:
            beside.stop()
            return None
        beside.attach(forward)
        return beside, splice

    async def _by_sidecar(
        self, context: RequestContext, body: bytes | None, decision: Decision
    ) -> Forward | Reject:
        """Send a request to a D whose sidecar has it prefilled on the P that is chosen here."""
        claim = await self._sidecar.choose(context, decision)
        if isinstance(claim, Reject):
            return claim
        if isinstance(claim, WithoutHandoff):
            return self.decode.without_handoff(context, body, claim, decision)
        self._local.take(False)
        # The first byte comes after the prefill.
        limit = self.decode.limit(context) + self.config.prefill_timeout
        way = ToDecode(context, decision, Served.SPLIT, body, limit, beside=claim.endpoint)
        try:
            forward = self.decode.send(way)
        except NoPartner:
            claim.end(self._clock())
            decision.not_split = "no_decode"
            return self.decode.alone(context, body, decision)
        except Exception:
            claim.end(self._clock())
            raise
        if isinstance(forward, Reject):
            claim.end(self._clock())
        else:
            forward.only = self._scheduler.fitting(claim.endpoint, forward.decode)
            self.in_flight.claimed(forward, claim)
        return forward


def _explained(outcome: Forward | Reject, decision: Decision) -> Forward | Reject:
    """Return an outcome whose answer says why, for a client that has asked for it."""
    line = in_a_line(decision)
    if isinstance(outcome, Reject):
        return replace(outcome, headers={**outcome.headers, names.DECISION: line})
    outcome.explanation = line
    return outcome
