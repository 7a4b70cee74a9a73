"""The second half of a request: the D that gets it, with a hand-off or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

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
from ..request.errors import Reject, reject
from ..scheduler import Scheduler
from ..telemetry import Served, Telemetry
from ..tracing import current
from .catalog import Catalog
from .forward import Forward
from .in_flight import RequestsInFlight
from .share_limit import ShareLimit
from .time_limits import LEASE_SHARE, first_byte_timeout
from .together import Beside
from .tried import WithoutHandoff, lost_twice, no_prefill


class NoPartner(Exception):
    """No D that fits P can serve any more: its hand-off cannot be used."""


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
        self._connectors = connectors
        self._telemetry = telemetry
        self._recording = recording
        self._catalog = catalog
        self._in_flight = in_flight
        self._local = local
        self._clock = clock

    def send(
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
        decode = self._choose(context, served, decision, preferred, own, bound, beside)
        if isinstance(decode, Reject):
            return decode
        first = decode[0]
        self._telemetry.forwarded(first.id, served)
        self._telemetry.by_revision.forwarded(first.instance.revision)
        transferred = context.uncached(first.holder) if beside is not None else 0.0
        step = first.decode.step(first.requests + 1, first.kv_tokens + context.prompt_tokens)
        predicted_ttft = self._predicted_ttft(context, decision, served, first, transferred, step)
        trace = current.get()
        if trace is not None:
            strategy = self._scheduler.strategies.names[InstanceRole.DECODE]
            trace.picked(InstanceRole.DECODE, strategy, first.id, context.now, self._clock())
        forward = self._start(context, body, served, limit, decision, decode, beside)
        if beside is not None:
            forward.transferred, forward.step = transferred, step
        decision.id, decision.served, decision.decode_to = forward.id, served, decode
        decision.prompt_tokens = context.prompt_tokens
        decision.predicted_ttft = predicted_ttft
        if trace is not None:
            forward.trace = trace
            trace.decode_sent(forward.id, served, context.prompt_tokens, first.id, first.url, self._clock())
            if decision.continues_from is not None:
                trace.continues(decision.continues_from, decision.continues_after)
        return forward

    def _choose(
        self,
        context: RequestContext,
        served: Served,
        decision: Decision,
        preferred: Endpoint | None,
        own: Endpoint | None,
        bound: bool,
        beside: Endpoint | None,
    ) -> list[Endpoint] | Reject:
        """Return the D of a request, that of the first attempt first; see :meth:`send`."""
        pick = self._scheduler.preview if preferred else self._scheduler.pick
        count = 1 + self._config.max_retries
        picked = pick(InstanceRole.DECODE, context, count=count, beside=beside)
        choice = self._scheduler.explain(InstanceRole.DECODE, context)
        now = context.now
        outside = self._scheduler.outside(InstanceRole.DECODE, context.subset)
        if preferred in outside:
            preferred = None
        has_room = preferred is not None and (
            bound or (preferred.routable and not self._scheduler.limits.saturated(preferred, now))
        )
        if preferred is not None and has_room:
            picked = [preferred, *(e for e in picked if e is not preferred)]
            if preferred is not own:  # else that was another pick
                decision.decode = choice
        else:
            own, decision.decode = picked[0] if picked else None, choice
        if beside is not None and not picked and self._has_no_partner(context, beside):
            raise NoPartner
        picked = picked or self._scheduler.last_resorts(InstanceRole.DECODE, outside, context.model)
        if not picked:
            return self.no_decode(context, decision)
        if decision.continues_from and not bound:  # the one that has failed the answer comes last
            picked = sorted(picked, key=lambda endpoint: endpoint.id == decision.continues_from)
        decode = self._in_turn(context, picked[:count], count)
        if served is not Served.PASSED and self._connectors.some_need_prefill:
            decode = self._able(decode, context, served, beside, count)
            if not decode:
                return no_prefill() if served is Served.LOCAL else _indivisible()
        if decode[0] is own:  # not what another rule has chosen
            self._scheduler.compare_shadow(InstanceRole.DECODE, context, own, beside=beside)
        return decode

    def _start(
        self,
        context: RequestContext,
        body: bytes | None,
        served: Served,
        limit: float | None,
        decision: Decision,
        decode: list[Endpoint],
        beside: Endpoint | None,
    ) -> Forward:
        """Take a place at the first D, and return the forward there."""
        removed = [n for n in context.headers if n.startswith(names.STEERING_PREFIXES)]
        reservation = self._registry.work.reserve(decode[0], context)
        forward = self._in_flight.start(decode, reservation, body, limit, removed, decision)
        forward.comparable, forward.prompt = served is not Served.PASSED, context.fingerprint
        forward.stream, forward.losses = context.stream, self._in_flight.lost.spent(context.fingerprint)
        forward.request_id = context.request_id
        if self._registry.has_ranks:
            forward.ranks = {str(each.address): each.rank for each in decode if each.rank is not None}
        forward.served = served
        if beside is not None and self._registry.pairs.in_doubt:
            self._registry.pairs.tried(beside, decode[0], reservation)
        if served is not Served.PASSED:
            forward.recorded = self._recording.begin(context)
        return forward

    def serves_alone(self, endpoint: Endpoint) -> bool:
        """Whether a D can serve a request that no P prefills."""
        return not self._connectors.of(endpoint.instance).needs_prefill

    def _able(
        self,
        decode: list[Endpoint],
        context: RequestContext,
        served: Served,
        beside: Endpoint | None,
        count: int,
    ) -> list[Endpoint]:
        """Return those D that can serve a request, further attempts included."""
        if beside is not None and not self.serves_alone(beside):
            fitting = self._scheduler.fitting(beside, decode)
            return decode if fitting is None else [each for each in decode if each in fitting]
        able = [each for each in decode if self.serves_alone(each) or (each is decode[0] and beside)]
        if able:
            return able
        outside = self._scheduler.outside(InstanceRole.DECODE, context.subset)
        others = self._scheduler.last_resorts(InstanceRole.DECODE, outside, context.model)
        return [each for each in others if self.serves_alone(each)][:count]

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
            limit = first_byte_timeout(self._config, body, self._in_flight.patience.factor)
            forward = self.send(
                context,
                body.raw if body.changed else None,
                Served.SPLIT,
                min(self._config.prefill_timeout, left) + limit,  # the first byte comes after the prefill
                decision,
                beside=prefill.endpoint,
            )
        except ConnectorFailed:
            prefill.stop()
            return no_prefill()
        except NoPartner:
            prefill.stop()
            return self.no_decode(context, decision)
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

    async def whole(
        self,
        context: RequestContext,
        body: bytes | None,
        served: Served,
        limit: float | None,
        decision: Decision,
        preferred: Endpoint | None = None,
        bound: bool = False,
    ) -> Forward | Reject:
        """Send a request to decode alone, as soon as there is room; see :meth:`send`."""
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
        refused_for = self._in_flight.lost.refused_for(context.fingerprint, self._clock())
        if refused_for:  # others with its prompt were lost while it has waited
            return lost_twice(math.ceil(refused_for))
        return self.send(context, body, served, limit, decision, preferred or own, own, bound)

    def with_handoff(
        self,
        context: RequestContext,
        body: JsonBody,
        prefilled: PendingHandoff,
        left: float,
        decision: Decision,
    ) -> Forward | Reject:
        """Send a request to decode with its hand-off, which may be used for ``left`` seconds more."""
        changed, only = body.raw if body.changed else None, prefilled.decode
        splice, usable = self._spliced(body, prefilled)
        why = None if usable else "splice"
        if usable and only is not None and not only.routable:
            why = "no_decode"
        if why is None:
            limit = first_byte_timeout(self._config, body, self._in_flight.patience.factor, left)
            try:
                forward = self.send(
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
                why = "no_decode"
        if why is not None:
            decision.not_split = why
            self._in_flight.handoffs.free(prefilled)
            limit = first_byte_timeout(self._config, body, self._in_flight.patience.factor)
            return self.send(context, changed, Served.LOCAL, limit, decision)
        if isinstance(forward, Reject):
            self._in_flight.handoffs.free(prefilled)
        else:
            fitting = self._scheduler.fitting(prefilled.prefill, forward.decode)
            forward.only = fitting if only is None else [only]
            forward.splice, forward.pending = splice, prefilled
            forward.losses = prefilled.losses
            if prefilled.handoff.pinned:
                prefilled.prefill.keep_handoff()
                self._registry.work.handed_over(prefilled.prefill, forward.decode[0])
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

    def without_handoff(
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
        decision.not_split = "prefill"
        forward = self.send(context, body, Served.LOCAL, limit, decision)
        if isinstance(forward, Forward):
            forward.refused_by, forward.refused_status = why.refused_by, why.status
            forward.losses, forward.errors = max(forward.losses, why.losses), why.errors
        return forward

    def _predicted_ttft(
        self,
        context: RequestContext,
        decision: Decision,
        served: Served,
        decode: Endpoint,
        transferred: float,
        step: float,
    ) -> float | None:
        """Return predicted seconds from the arrival to the first token: of P, when that was chosen."""
        load, prompt = self._registry.load, context.prompt_tokens
        if served is Served.SPLIT:
            prefill = decision.prefill_attempts[-1]
            handoff = load.handoff(prefill.instance, decode.id, transferred)
            before = prefill.at - decision.arrived + (prefill.predicted or 0.0) + handoff
        elif prompt:
            new = context.uncached(decode.holder)
            cost = load.prefill.predict((1.0, new, prefill_pairs(new, prompt)))
            before = context.now - decision.arrived + cost
        else:
            return None
        return before + step

    def _has_no_partner(self, context: RequestContext, prefill: Endpoint) -> bool:
        """Whether there are D, but none that could use what a P hands over."""
        scheduler, role = self._scheduler, InstanceRole.DECODE
        return scheduler.several_kinds or bool(scheduler.barred(role, context, prefill))

    def _in_turn(self, context: RequestContext, picked: list[Endpoint], count: int) -> list[Endpoint]:
        """Return up to ``count`` that Envoy tries one after another: those picked, then the last resorts."""
        # A further attempt has the same headers: same key only.
        key = picked[0].instance.api_key
        found = [endpoint for endpoint in picked if endpoint.instance.api_key == key]
        if self._registry.has_ranks:
            found = _of_each_process(found)
            picked = [rank for each in picked for rank in self._registry.ranks_of(each)]
        if len(found) < count:
            taken = [*picked, *self._scheduler.outside(InstanceRole.DECODE, context.subset)]
            others = self._scheduler.last_resorts(InstanceRole.DECODE, taken, context.model)
            found += [endpoint for endpoint in others if endpoint.instance.api_key == key]
        return found[:count]

    def no_decode(self, context: RequestContext, decision: Decision) -> Reject:
        """Return the answer to a request that no D can serve."""
        unknown = self._catalog.unknown(decision.asked_model, context.model)
        if unknown is not None:  # an adapter may have been unloaded meanwhile
            return unknown
        registered = self._registry.endpoints(InstanceRole.DECODE)
        endpoints = [e for e in registered if self._scheduler.may_serve(e, context.model)]
        nobody = (
            "none that has the model is of a revision with a weight" if registered else "none is registered"
        )
        states = ", ".join(f"{e.id} is {e.state}" for e in endpoints[:8]) or nobody
        return reject(503, f"No decode instance can serve this request now: {states}.", "no_decode")


def _indivisible() -> Reject:
    """Return the answer to a request that only a D that prefills could serve, where no D does."""
    words = (
        "This request cannot be split between prefill and decode instances, and no decode instance here "
        "serves one alone."
    )
    return reject(501, words, "indivisible")


def _of_each_process(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """Return the first endpoint of each process: a request that one has failed is not for its other ranks."""
    found: dict[str, Endpoint] = {}
    for endpoint in endpoints:
        found.setdefault(endpoint.instance.instance_id, endpoint)
    return list(found.values())
