"""The second half of a request: the D that gets it, with a hand-off or without."""

from __future__ import annotations

import math
from collections.abc import Callable

from msgspec.structs import replace

from ..admission.controller import AdmissionController
from ..admission.queue import Ticket
from ..config import SchedulerConfig
from ..connectors import ConnectorFailed, Connectors, Splice
from ..fleet.endpoint import Endpoint
from ..handoff.pending import PendingHandoff
from ..models import InstanceRole
from ..prediction.prefill_load import prefill_pairs
from ..records.decision import Decision
from ..records.recording import Recording
from ..request import headers as names
from ..request.body import JsonBody
from ..request.context import RequestContext
from ..request.errors import Reject
from ..scheduler import Scheduler
from ..telemetry import Served, Telemetry
from ..tracing import current
from .catalog import Catalog
from .decode_choice import DecodeChoice, NoPartner, ToDecode
from .forward import Forward
from .in_flight import RequestsInFlight
from .share_limit import ShareLimit
from .time_limits import LEASE_SHARE, first_byte_timeout
from .together import Beside
from .tried import WithoutHandoff, lost_twice, no_prefill


class DecodeStage:
    """Chooses D for requests, and notes them as in flight there.

    ``local`` counts those that D prefills because P failed.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        admission: AdmissionController,
        connectors: Connectors,
        telemetry: Telemetry,
        recording: Recording,
        catalog: Catalog,
        in_flight: RequestsInFlight,
        local: ShareLimit,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._admission = admission
        self._telemetry = telemetry
        self._recording = recording
        self.choice = DecodeChoice(config, scheduler, connectors, catalog)
        self._in_flight = in_flight
        self._local = local
        self._clock = clock

    def limit(self, context: RequestContext, left: float = math.inf) -> float:
        """Return the seconds that D may take to the first byte of an answer: see :mod:`.time_limits`."""
        return first_byte_timeout(self._config, context, self._in_flight.patience.factor, left)

    def send(self, way: ToDecode) -> Forward | Reject:
        """Send a request to the D that is chosen for it; raise :exc:`.NoPartner` if none fits its P."""
        context, decision, beside = way.context, way.decision, way.beside
        context.at(self._clock())
        decode = self.choice.choose(way)
        if isinstance(decode, Reject):
            return decode
        first = decode[0]
        self._telemetry.forwarded(first.id, way.served)
        self._telemetry.by_revision.forwarded(first.instance.revision)
        transferred = context.uncached(first.holder) if beside is not None else 0.0
        step = first.decode.step(first.requests + 1, first.kv_tokens + context.prompt_tokens)
        predicted_ttft = self._predicted_ttft(way, first, transferred, step)
        trace = current.get()
        if trace is not None:
            strategy = self._scheduler.strategies.names[InstanceRole.DECODE]
            trace.picked(InstanceRole.DECODE, strategy, first.id, context.now, self._clock())
        forward = self._start(way, decode)
        if beside is not None:
            forward.transferred, forward.step = transferred, step
        decision.id, decision.served, decision.decode_to = forward.id, way.served, decode
        decision.prompt_tokens = context.prompt_tokens
        decision.predicted_ttft = predicted_ttft
        if trace is not None:
            forward.trace, prompt = trace, context.prompt_tokens
            trace.decode_sent(forward.id, way.served, prompt, first.id, first.url, self._clock())
            if decision.continues_from is not None:
                trace.continues(decision.continues_from, decision.continues_after)
        return forward

    def _start(self, way: ToDecode, decode: list[Endpoint]) -> Forward:
        """Take a place at the first D, and return the forward there."""
        context, beside, registry = way.context, way.beside, self._registry
        removed = [n for n in context.headers if n.startswith(names.STEERING_PREFIXES)]
        reservation = registry.work.reserve(decode[0], context)
        forward = self._in_flight.start(decode, reservation, way.body, way.limit, removed, way.decision)
        forward.served, forward.stream, forward.prompt = way.served, context.stream, context.fingerprint
        forward.request_id = context.request_id
        forward.losses = self._in_flight.lost.spent(context.fingerprint)
        if registry.has_ranks:
            forward.ranks = {str(each.address): each.rank for each in decode if each.rank is not None}
        if beside is not None and registry.pairs.in_doubt:
            registry.pairs.tried(beside, decode[0], reservation)
        if way.served is Served.PASSED:
            forward.comparable = False
        else:
            forward.recorded = self._recording.begin(context)
        return forward

    async def whole(self, way: ToDecode) -> Forward | Reject:
        """Send a request to decode alone, as soon as there is room."""
        context, decision = way.context, way.decision
        ticket = Ticket(context, InstanceRole.DECODE, len(way.body or b"") or context.body_bytes)
        try:
            outcome = await self._admission.admit(ticket)
        finally:
            decision.waited = ticket.waited
        if isinstance(outcome, Reject):
            return outcome
        if outcome is not None:  # it has kept the place until now
            outcome.release()
            way.own, decision.decode = outcome.endpoint, ticket.choice
            way.preferred = way.preferred or way.own
        refused_for = self._in_flight.lost.refused_for(context.fingerprint, self._clock())
        if refused_for:  # others with its prompt were lost while it has waited
            return lost_twice(math.ceil(refused_for))
        way.limit = self.limit(context)
        return self.send(way)

    def alone(self, context: RequestContext, body: bytes | None, decision: Decision) -> Forward | Reject:
        """Send a request to decode, which prefills it too, without a wait: P cannot."""
        return self.send(ToDecode(context, decision, Served.LOCAL, body, self.limit(context)))

    def without_handoff(
        self, context: RequestContext, body: bytes | None, why: WithoutHandoff, decision: Decision
    ) -> Forward | Reject:
        """Send a request to decode, which prefills it too: P has failed or refused it."""
        if not self._local.take(why.failed):
            return no_prefill()
        decision.not_split = "prefill"
        forward = self.alone(context, body, decision)
        if isinstance(forward, Forward):
            forward.refused_by, forward.refused_status = why.refused_by, why.status
            forward.losses, forward.errors = max(forward.losses, why.losses), why.errors
        return forward

    def with_handoff(
        self,
        context: RequestContext,
        body: JsonBody,
        prefilled: PendingHandoff,
        left: float,
        decision: Decision,
    ) -> Forward | Reject:
        """Send a request to decode with its hand-off, which may be used for ``left`` seconds more."""
        changed, only, prefill = body.raw if body.changed else None, prefilled.decode, prefilled.prefill
        splice, usable = self._spliced(body, prefilled)
        if not usable:
            return self._in_vain(context, changed, prefilled, decision, "splice")
        if only is not None and not only.routable:
            return self._in_vain(context, changed, prefilled, decision, "no_decode")
        way = ToDecode(
            context, decision, Served.SPLIT, changed, self.limit(context, left),
            only, only, bound=only is not None, beside=prefill,
        )  # fmt: skip
        try:
            forward = self.send(way)
        except NoPartner:
            return self._in_vain(context, changed, prefilled, decision, "no_decode")
        if isinstance(forward, Reject):
            self._in_flight.handoffs.free(prefilled)
            return forward
        forward.only = self._scheduler.fitting(prefill, forward.decode) if only is None else [only]
        forward.splice, forward.pending, forward.losses = splice, prefilled, prefilled.losses
        if prefilled.handoff.pinned:
            prefill.keep_handoff()
            self._registry.work.handed_over(prefill, forward.decode[0])
        return forward

    def _in_vain(
        self,
        context: RequestContext,
        body: bytes | None,
        prefilled: PendingHandoff,
        decision: Decision,
        why: str,
    ) -> Forward | Reject:
        """Send a request whose hand-off cannot be used."""
        decision.not_split = why
        self._in_flight.handoffs.free(prefilled)
        return self.alone(context, body, decision)

    def together(
        self, context: RequestContext, body: JsonBody, prefill: Beside, decision: Decision
    ) -> Forward | Reject:
        """Send a request to decode while P prefills it."""
        try:
            handoff = prefill.attempt.promised()
            splice = None if handoff is None else prefill.attempt.splice(body, handoff)
            if handoff is None or splice is None or not self.fits(splice):
                prefill.stop()
                return no_prefill()
            left = (handoff.lease or self._config.kv_lease_duration) * LEASE_SHARE
            # The first byte comes after the prefill.
            limit = min(self._config.prefill_timeout, left) + self.limit(context)
            changed = body.raw if body.changed else None
            way = ToDecode(context, decision, Served.SPLIT, changed, limit, beside=prefill.endpoint)
            forward = self.send(way)
        except ConnectorFailed:
            prefill.stop()
            return no_prefill()
        except NoPartner:
            prefill.stop()
            return self.choice.no_decode(context, decision)
        except Exception:
            prefill.stop()
            raise
        if isinstance(forward, Reject):
            prefill.stop()
        else:
            forward.only = self._scheduler.fitting(prefill.endpoint, forward.decode)
            forward.splice = splice
            prefill.attach(forward)
        return forward

    def _spliced(self, body: JsonBody, prefilled: PendingHandoff) -> tuple[Splice | None, bool]:
        """Return how a hand-off goes into a body, and whether it can: it may be too long."""
        try:
            splice = prefilled.attempt.splice(body, prefilled.handoff)
            if prefilled.handoff.token_ids:  # they are long, and of no more use
                prefilled.handoff = replace(prefilled.handoff, token_ids=b"")
                if not self.fits(splice):
                    splice = prefilled.attempt.splice(body, prefilled.handoff)
        except ConnectorFailed:
            return None, False
        return splice, self.fits(splice)

    def add_encoded(self, forward: Forward, body: JsonBody) -> None:
        """Have a D that prefills get what it needs to find encoded items: the field that P gets otherwise."""
        if forward.pending is None and forward.sidecar is None and forward.splice is None:
            ((name, text),) = body.more.items()
            splice = Splice(*body.one_more(name, text))
            forward.splice = splice if self.fits(splice) else None

    def fits(self, splice: Splice | None) -> bool:
        """Whether D's body is not too large with a splice: else Envoy would answer 413 in D's place."""
        return splice is None or splice.at + len(splice.text) <= self._config.max_body_bytes

    def _predicted_ttft(
        self, way: ToDecode, decode: Endpoint, transferred: float, step: float
    ) -> float | None:
        """Return predicted seconds from the arrival to the first token: of P, when that was chosen."""
        load, context, decision = self._registry.load, way.context, way.decision
        if way.served is Served.SPLIT:
            prefill = decision.prefill_attempts[-1]
            handoff = load.handoff(prefill.instance, decode.id, transferred)
            return prefill.at - decision.arrived + (prefill.predicted or 0.0) + handoff + step
        if not (prompt := context.prompt_tokens):
            return None
        new = context.uncached(decode.holder)
        cost = load.prefill.predict((1.0, new, prefill_pairs(new, prompt)))
        return context.now - decision.arrived + cost + step
