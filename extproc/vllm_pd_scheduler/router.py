"""The core that everything calls: parse, pick P, prefill, pick D, and give back what was reserved."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import headers as names
from .body import BodyError, JsonBody, strip_handoff
from .breaker import BreakerPolicy
from .config import SchedulerConfig
from .connectors import Connector, Handoff, NixlConnector
from .disaggregation import Disaggregation
from .dispatch import Dispatcher
from .errors import Reject, reject
from .forward import Forward, PendingHandoff
from .forwards import Forwards
from .gate import Gate
from .held import HeldBytes
from .intake import HeaderError, Intake
from .legs import PrefillAnswer, PrefillFailed, PrefillLeg
from .limits import ShareLimit
from .models import InstanceRole, PDInstance, RequestContext
from .registry import Endpoint, HealthPolicy, Registry, Reservation
from .scheduler import Scheduler
from .telemetry import Served, Telemetry
from .waiting import Ticket

if TYPE_CHECKING:
    from .direct import RouteResult

SPLIT_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Paths whose POST requests are split in prefill and decode. All others go to decode as they are."""


LEASE_SHARE = 0.8
"""Share of the lease (``kv_lease_duration``) in which a hand-off may be used; the rest is for what cannot be
seen: the way of P's answer to us, and D's own queue."""

MAX_TOKENS = 10_000_000
"""More than any context has: a client that asks for more tokens than this gets no longer limit for it."""


class PDRouter:
    """Routes requests to the instances of a fleet whose prefill and decode are separate.

    ``route`` is what the ext_proc server calls. A script without Envoy uses ``register_instance``,
    ``run_health_checks`` and ``route_request``, which block until they are done and must not be called
    from a running event loop.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        prefill_leg: PrefillLeg | None = None,
        connector: Connector | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.registry = Registry(_health_policy(config))
        for instance in config.instances():
            self.registry.add(instance)
        self.scheduler = Scheduler(config, self.registry)
        self.telemetry = telemetry or Telemetry(self.registry)
        self.telemetry.watch_shadow(lambda: self.scheduler.shadow)
        self.connector = connector or NixlConnector()
        self.prefill_leg = prefill_leg
        self._clock = clock
        self._intake = Intake(config, self.registry.load)
        self._disaggregation = Disaggregation(config, self.scheduler)
        self.dispatcher = Dispatcher(self.scheduler)
        self._gate = Gate(self.dispatcher, clock, self.telemetry)
        self.registry.on_scraped = self._gate.changed
        self.registry.subscribe(self._gate.changed)
        self.held = HeldBytes(config.max_held_bytes, config.max_body_bytes)
        self.telemetry.watch(self.dispatcher.line, lambda: self.held.total)
        self._local = ShareLimit(config.max_local_prefill_share)
        self.forwards = Forwards(self.registry, self.telemetry, clock, self._gate.changed)

    # -- instances

    def register_instance(self, instance: PDInstance) -> None:
        """Add an instance; it takes requests once a health check found it serving.

        Raises :exc:`~vllm_pd_scheduler.registry.DuplicateInstance`.
        """
        self.registry.add(instance)

    def unregister_instance(self, instance_id: str) -> None:
        """Forget an instance; raises :exc:`~vllm_pd_scheduler.registry.UnknownInstance`."""
        self.registry.remove(instance_id)

    def drain_instance(self, instance_id: str) -> None:
        """Send an instance nothing new; raises :exc:`~vllm_pd_scheduler.registry.UnknownInstance`."""
        self.registry.drain(instance_id)

    def undrain_instance(self, instance_id: str) -> None:
        """Undo a drain; raises :exc:`~vllm_pd_scheduler.registry.UnknownInstance`."""
        self.registry.undrain(instance_id)

    def get_instances(self, role: InstanceRole | None = None) -> list[PDInstance]:
        """Return the registered instances, or those of one role."""
        return [endpoint.instance for endpoint in self.registry.endpoints(role)]

    # -- the request path

    async def route(self, headers: Mapping[str, str], body: bytes) -> Forward | Reject:
        """Decide where a request goes, prefilling it first where that is possible.

        ``headers`` has lower-case names, with the pseudo headers ``:method`` and ``:path``. Cancelling
        the call cancels the prefill.
        """
        path = headers.get(":path", "/").partition("?")[0]
        outcome: Forward | Reject
        try:
            if path in SPLIT_PATHS and headers.get(":method") == "POST":
                outcome = await self._split(path, headers, JsonBody.parse(body))
            else:
                clean = strip_handoff(body)
                context = self._intake.passed(path, headers, len(body), self._clock())
                outcome = self._to_decode(context, None if clean is body else clean, Served.PASSED, None)
        except BodyError as error:
            outcome = reject(400, str(error), "bad_body")
        except HeaderError as error:
            outcome = reject(400, str(error), "bad_header")
        if isinstance(outcome, Reject):
            self.telemetry.rejected(outcome)
        return outcome

    def no_memory(self, size: int) -> Reject:
        """Return the answer to a request whose body of ``size`` bytes cannot be held (see :attr:`held`)."""
        if size > self.held.largest:
            answer = reject(413, f"The request body is larger than {self.held.largest} bytes.", "too_large")
        else:
            answer = reject(429, "The scheduler holds too many requests.", "memory")
        self.telemetry.rejected(answer)
        return answer

    async def _split(self, path: str, headers: Mapping[str, str], body: JsonBody) -> Forward | Reject:
        context = self._intake.read(
            path, headers, body, self._clock(), prefixes=self.scheduler.reads_prefixes
        )
        if not self.registry.routable(InstanceRole.DECODE):
            return self._no_decode()
        changed = body.raw if body.stripped else None
        limit = self._first_byte_timeout(body)
        if not self.connector.can_split(body):
            return await self._whole(context, changed, Served.WHOLE, limit)
        alone = self._disaggregation.local(context)
        if alone is not None:
            return await self._whole(context, changed, Served.ALONE, limit, alone)
        prefilled = await self._prefill(context, headers, body)
        if isinstance(prefilled, Reject):
            return prefilled
        if prefilled is None:
            if not self._local.take(True):
                return _no_prefill()
            return self._to_decode(context, changed, Served.LOCAL, limit)
        self._local.take(False)
        left = prefilled.deadline - self._clock()
        if left <= 0:
            # The event loop was held up. P's blocks may be another prompt's by now.
            self.telemetry.handoff_late(prefilled.prefill)
            return self._to_decode(context, changed, Served.LOCAL, limit)
        spliced, at = self.connector.decode_body(body, prefilled.handoff)
        forward = self._to_decode(context, spliced, Served.SPLIT, self._first_byte_timeout(body, left))
        if isinstance(forward, Reject):
            self.forwards.free(prefilled)
        else:
            forward.handoff_at, forward.pending = at, prefilled
            prefilled.prefill.pending_handoffs += 1
        return forward

    async def _whole(
        self,
        context: RequestContext,
        body: bytes | None,
        served: Served,
        limit: float | None,
        preferred: Endpoint | None = None,
    ) -> Forward | Reject:
        """Have decode serve a request alone, when it has room."""
        ticket = Ticket(context, InstanceRole.DECODE, len(body or b"") or context.body_bytes)
        outcome = await self._gate.enter(ticket)
        if isinstance(outcome, Reject):
            return outcome
        if outcome is not None:  # it has kept the place until now
            outcome.release()
            preferred = preferred or outcome.endpoint
        return self._to_decode(context, body, served, limit, preferred)

    async def _prefill(
        self, context: RequestContext, headers: Mapping[str, str], body: JsonBody
    ) -> PendingHandoff | Reject | None:
        """Prefill on one instance after another, up to ``max_retries`` more; ``None``: let decode do it."""
        if self.prefill_leg is None:
            return None
        tried: list[Endpoint] = []
        leg_body = b""
        outcome = await self._gate.enter(Ticket(context, InstanceRole.PREFILL, context.body_bytes))
        while not isinstance(outcome, Reject):
            if outcome is None:
                break
            tried.append(outcome.endpoint)
            leg_body = leg_body or self.connector.prefill_body(body)
            answer = await self._leg(self.prefill_leg, outcome, context, headers, leg_body)
            if isinstance(answer, Handoff):
                deadline = self._clock() + self.config.kv_lease_duration * LEASE_SHARE
                return PendingHandoff(answer, tried[-1], deadline, context.model)
            if answer is not None:
                if answer.status == 200:
                    self.telemetry.prefill_failed(tried[-1], "no_handoff")
                    return None
                kept = {"content-type": answer.content_type}
                return Reject(answer.status, answer.body, kept, "prefill_4xx")
            outcome = self._another(context, tried)
        else:
            return outcome
        if self.config.on_prefill_failure == "fail":
            return _no_prefill()
        return None

    def _another(self, context: RequestContext, tried: list[Endpoint]) -> Reservation | None:
        """Reserve an endpoint that was not tried; it does not wait in line a second time."""
        if len(tried) > self.config.max_retries:
            return None
        context.now = self._clock()
        picked = self.scheduler.pick(InstanceRole.PREFILL, context, exclude=tried)
        if picked:
            self.scheduler.decided(InstanceRole.PREFILL, context, picked[0], tried)
        elif self.config.on_prefill_failure == "fail" or self._local.reached:
            # Not where decode may prefill: an ejected one can take its whole time-out, and fail after all.
            picked = self.scheduler.last_resorts(InstanceRole.PREFILL, tried)
        return self.registry.reserve(picked[0], context) if picked else None

    async def _leg(
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
            with self.telemetry.prefill(endpoint):
                answer = await leg(endpoint, context.path, headers, body)
        except PrefillFailed as error:
            reason = str(error)
        else:
            if answer.status == 200 or _is_the_clients_fault(answer.status, endpoint.instance):
                self.registry.succeeded(endpoint)
                handoff = self.connector.handoff(answer.body) if answer.status == 200 else None
                if handoff is not None:
                    self._prefilled(reservation, context, handoff)
                return handoff or answer
            reason = f"status_{answer.status}"
        finally:
            reservation.release(self._clock())
            # Soon, since this request itself is about to take a place at decode.
            asyncio.get_running_loop().call_soon(self._gate.changed)
        self.telemetry.prefill_failed(endpoint, reason)
        self.registry.failed(endpoint, f"prefill: {reason}", self._clock())
        return None

    def _prefilled(self, reservation: Reservation, context: RequestContext, handoff: Handoff) -> None:
        """Learn from a prefill how long it took, and how long the prompt was."""
        tokens, now = handoff.prompt_tokens, self._clock()
        if tokens is None or tokens < 1:
            return
        self.telemetry.prefill_predicted(reservation, now)
        self.registry.prefilled(reservation, tokens, handoff.cached_tokens, now)
        self.registry.load.learn_bytes(context.model, context.prompt_bytes, tokens)
        context.prompt_tokens = tokens

    def _to_decode(
        self,
        context: RequestContext,
        body: bytes | None,
        served: Served,
        limit: float | None,
        preferred: Endpoint | None = None,
    ) -> Forward | Reject:
        context.now = self._clock()
        pick = self.scheduler.preview if preferred else self.scheduler.pick
        count = 1 + self.config.max_retries
        picked = pick(InstanceRole.DECODE, context, count=count)
        if not picked:
            return self._no_decode()
        self.scheduler.decided(InstanceRole.DECODE, context, picked[0])
        if preferred is not None and preferred.routable and not self.scheduler.saturated(preferred):
            others = (e for e in picked if e is not preferred)
            picked = [preferred, *others][:count]
        decode = self._in_turn(picked, count)
        self.telemetry.forwarded(decode[0], served)
        removed = [n for n in context.headers if n.startswith(names.STEERING_PREFIXES)]
        return self.forwards.start(decode, self.registry.reserve(decode[0], context), body, limit, removed)

    def _in_turn(self, picked: list[Endpoint], count: int) -> list[Endpoint]:
        """Return up to ``count`` that Envoy tries one after another: those picked, then the last resorts."""
        # A further attempt has the same headers: same key only.
        key = picked[0].instance.api_key
        found = [endpoint for endpoint in picked if endpoint.instance.api_key == key]
        if len(found) < count:
            others = self.scheduler.last_resorts(InstanceRole.DECODE, picked)
            found += [endpoint for endpoint in others if endpoint.instance.api_key == key]
        return found[:count]

    def _first_byte_timeout(self, body: JsonBody, left: float = math.inf) -> float | None:
        """How long D may take to its first byte: with a stream that is its headers, else the whole answer.

        ``left`` is how long the hand-off may be used: a byte that comes later may be of one that is too old,
        fetched by a D that was frozen meanwhile. Only an answer in one piece that takes longer by itself
        gets more. ``None``, that is no limit, for one of unknown length.
        """
        limit = self.config.decode_first_byte_timeout
        if body.get("stream") is True:
            return min(limit, left)
        tokens = body.get("max_completion_tokens") or body.get("max_tokens")
        if type(tokens) is not int or tokens < 1:
            return None
        decoding = min(tokens, MAX_TOKENS) * self.config.decode_seconds_per_token
        return limit + decoding if decoding > left else min(limit + decoding, left)

    def _no_decode(self) -> Reject:
        endpoints = self.registry.endpoints(InstanceRole.DECODE)
        states = ", ".join(f"{e.id} is {e.state}" for e in endpoints[:8]) or "none is registered"
        return reject(503, f"No decode instance can serve this request now: {states}.", "no_decode")

    # -- without Envoy

    def run_health_checks(self) -> dict[str, bool]:
        """Probe every instance once; return whether each can serve, by id. Blocks up to the timeout."""
        from .direct import check_all

        return check_all(self)

    def route_request(self, body: Mapping[str, Any]) -> RouteResult:
        """Serve one request (the body of a completion or chat completion), prefill then decode.

        Blocks until the whole answer is there. Never raises for what happens to the request: see
        :attr:`RouteResult.error`. Health checks run first if none has been run yet.
        """
        from .direct import serve_one

        return serve_one(self, body)


def _no_prefill() -> Reject:
    return reject(503, "No prefill instance can serve this request now.", "no_prefill")


def _is_the_clients_fault(status: int, instance: PDInstance) -> bool:
    """Whether another instance would answer the same. Timeouts and overload are the instance's own."""
    if status in (401, 403):
        return instance.api_key is None  # else it is our key that it does not take
    return 400 <= status < 500 and status not in (408, 429)


def _health_policy(config: SchedulerConfig) -> HealthPolicy:
    breaker = BreakerPolicy(
        failures=config.ejection_failures,
        success_rate=config.ejection_success_rate,
        pause=config.ejection_pause,
    )
    return HealthPolicy(
        config.unhealthy_threshold, config.healthy_threshold, breaker, config.max_ejected_share
    )
