"""The library's face: a router of requests to a fleet whose prefill and decode are separate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from .admission.body_memory import BodyAllocation, BodyMemory
from .admission.controller import AdmissionController
from .admission.dispatcher import Dispatcher
from .config import SchedulerConfig, connector_choice
from .config.fleet_instance import check_connector
from .connectors import Connector, Connectors
from .discovery import CONFIG, Membership
from .fleet.breaker import BreakerPolicy
from .fleet.registry import HealthPolicy, Registry
from .handoff.interfaces import AbortLeg, AskPrefill, EncodeLeg, PrefillLeg
from .health import PairLog, StateLog
from .models import PD_ROLES, By, InstanceRole, PDInstance
from .records.decisions import Decisions
from .records.events import EventKind, Events
from .records.recording import Recording
from .request.context import RequestContext
from .request.errors import Reject, reject
from .request.objectives import Objectives
from .request.rewrites import Rewrites
from .routing.answer_watch import AnswerWatch
from .routing.catalog import Catalog
from .routing.core import RoutingCore
from .routing.decode_first import DecodeFirst
from .routing.forward import Forward
from .routing.going_on import GoingOn
from .routing.in_flight import RequestsInFlight
from .routing.later import Later, in_this_loop
from .routing.without_envoy import RouteResult, check_all, serve_one
from .scheduler import Scheduler
from .scheduler.misfits import misfits
from .telemetry import Telemetry

if TYPE_CHECKING:
    from .sync.sync import Sync
    from .tracing.request_tracer import RequestTracer

FORGET_S = 300.0
"""Seconds after an instance was removed in which the last of its requests should have ended."""


class PDRouter:
    """Routes requests to the instances of a fleet whose prefill and decode are separate.

    ``route`` is what the ext_proc server calls. A script without Envoy uses ``register_instance``,
    ``run_health_checks`` and ``route_request``, which block until they are done and must not be called
    from a running event loop. ``name`` is the scheduler's among several: ids of its requests begin with it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        prefill_leg: PrefillLeg | None = None,
        connector: Connector | None = None,
        telemetry: Telemetry | None = None,
        events: Events | None = None,
        clock: Callable[[], float] = time.monotonic,
        later: Later = in_this_loop,
        name: str = "",
    ) -> None:
        self.config = config
        self.events = events or Events(time.time, bool(name))
        self.registry = Registry(_health_policy(config))
        self.membership = Membership(self.registry, self.events)
        self.membership.update(CONFIG, config.instances())
        self.telemetry = telemetry or Telemetry()
        took = {role: self.telemetry.picks(role) for role in PD_ROLES}
        self.scheduler = Scheduler(config, self.registry, took=took, stopwatch=time.perf_counter)
        StateLog(self.registry, self.telemetry, self.events)
        PairLog(self.registry, self.events)
        self.connectors = Connectors(lambda: connector_choice(config.connector), connector)
        self.dispatcher = Dispatcher(self.scheduler, self.events)
        self.body_memory = BodyMemory(config.max_held_bytes, config.max_body_bytes)
        admission = AdmissionController(self.dispatcher, clock, self.telemetry)
        self.sync: Sync | None = None
        """Joins this scheduler to other replicas; without one, it is alone."""
        self.wake = admission.wake
        """Serves waiting requests that can be served now: call it when load or health have changed."""
        self.registry.on_scraped = admission.wake
        self.registry.changes.subscribe(admission.wake)
        self.decisions = Decisions(clock, time.time, bool(name))
        learning = self.registry.learning
        self.recording = Recording(
            clock, time.time, lambda: self.registry.load.output_tokens, lambda: learning.finished
        )
        self._core = RoutingCore(
            config,
            self.scheduler,
            admission,
            self.connectors,
            self.telemetry,
            self.decisions,
            self.recording,
            clock,
            later,
            self.body_memory,
            name,
        )
        self.rewrites.update(CONFIG, config.rewrites())
        self.prefill_leg = prefill_leg
        self.clock = clock
        """Monotonic seconds."""
        self._later = later
        self._described: dict[str, PDInstance] = {}
        self._follow_members()
        self.registry.changes.subscribe(self._follow_members)

    def _present(self) -> frozenset[str]:
        every = (name for e in self.registry for name in (e.id, e.instance.instance_id))
        return frozenset(every)

    def _use_connectors(self) -> None:
        prefill, decode = ([each.instance for each in self.registry.endpoints(role)] for role in PD_ROLES)
        self.connectors.used_by(prefill, decode)

    def _follow_members(self) -> None:
        """Follow who there is, and how they are described.

        Drop the metrics of instances that were removed, also those of requests that end a while later.
        """
        of = self.registry.changes.of
        if of is not None and of in self.registry and self._described.get(of.id) is of.instance:
            return
        before = self._described
        self._described = {endpoint.id: endpoint.instance for endpoint in self.registry}
        self._use_connectors()
        if before.keys() - self._described.keys():
            self._forget_others()
            self._later(FORGET_S, self._forget_others)

    def _forget_others(self) -> None:
        self.telemetry.keep_only(self._present())
        revisions = {endpoint.instance.revision for endpoint in self.registry}
        self.telemetry.by_revision.keep_only({each for each in revisions if each is not None})

    @property
    def in_flight(self) -> RequestsInFlight:
        """What was sent to decode and has not ended."""
        return self._core.in_flight

    @property
    def rewrites(self) -> Rewrites:
        """Which model a request gets that asks for an alias: each source updates its own rules."""
        return self._core.rewrites

    @property
    def catalog(self) -> Catalog:
        """Which models clients can ask for."""
        return self._core.catalog

    async def again(self, request: str, address: str, body: bytes) -> tuple[bytes, str] | None:
        """Have a request prefilled anew for a further attempt, at the D that is reached at ``address``.

        Return what its body ends with there, from where its first hand-off was put, and the id of its P.
        ``None``: nobody prefills it, or there is no memory for its body.
        """
        hold = BodyAllocation(self.body_memory)
        begun = None
        try:
            if hold.resize(len(body)):
                begun = await self._core.again(request, address, body)
        finally:
            if begun is None:
                hold.release()
            else:
                begun[0].when_done(hold.release)
        return begun and (begun[1].text, begun[0].endpoint.id)

    @property
    def abort_leg(self) -> AbortLeg | None:
        """Ends a leg whose other one has failed; without it, the instance waits by its own time-out."""
        return self._core.prefill.abort

    @abort_leg.setter
    def abort_leg(self, abort: AbortLeg | None) -> None:
        self._core.prefill.abort = abort

    @property
    def prefill_leg(self) -> PrefillLeg | None:
        """Sends the prefills; without one, decode does them itself."""
        return self._core.prefill.leg

    @prefill_leg.setter
    def prefill_leg(self, leg: PrefillLeg | None) -> None:
        self._core.prefill.leg = leg

    @property
    def encode_leg(self) -> EncodeLeg | None:
        """Sends media items to encode instances; without one, the prefill encodes them."""
        return self._core.encode.leg

    @encode_leg.setter
    def encode_leg(self, leg: EncodeLeg | None) -> None:
        self._core.encode.leg = leg

    @property
    def ask_prefill(self) -> AskPrefill | None:
        """Asks P what some connectors must know; without it, no request is split by those."""
        return self._core.prefill.ask

    @ask_prefill.setter
    def ask_prefill(self, ask: AskPrefill | None) -> None:
        self._core.prefill.ask = ask

    @property
    def decode_first(self) -> DecodeFirst:
        """Takes the calls by which D ask for prefills."""
        return self._core.decode_first

    @property
    def going_on(self) -> GoingOn:
        """Has another D chosen for the rest of an answer that broke off."""
        return self._core.going_on

    @property
    def objectives(self) -> Objectives:
        """The priorities of requests that name an objective, by ``x-llm-d-inference-objective``."""
        return self._core.objectives

    @property
    def tracer(self) -> RequestTracer | None:
        """Begins the traces of requests; without one, none is traced."""
        return self._core.tracer

    @tracer.setter
    def tracer(self, tracer: RequestTracer | None) -> None:
        self._core.tracer = tracer

    # -- instances

    def register_instance(self, instance: PDInstance, by: str = By.START) -> None:
        """Add an instance; it takes requests once a health check found it serving.

        Raises :exc:`~vllm_pd_scheduler.fleet.registry.DuplicateInstance`, and
        :exc:`~vllm_pd_scheduler.connectors.UnknownConnector` for one that its
        role cannot have, or that cannot be made.
        """
        if instance.connector is not None:
            check_connector(instance.role, instance.connector)
        self.connectors.prepare([instance])
        self.membership.add(instance, by)

    def unregister_instance(self, instance_id: str, by: str = By.START) -> None:
        """Forget an instance; raises :exc:`~vllm_pd_scheduler.fleet.registry.UnknownInstance`."""
        self.membership.remove(instance_id, by)

    def drain_instance(self, instance_id: str, by: str = By.START) -> None:
        """Send an instance nothing new; raises :exc:`~vllm_pd_scheduler.fleet.registry.UnknownInstance`."""
        self.membership.drain(instance_id, by)

    def undrain_instance(self, instance_id: str, by: str = By.START) -> None:
        """Undo a drain; raises :exc:`~vllm_pd_scheduler.fleet.registry.UnknownInstance`."""
        self.membership.undrain(instance_id, by)

    def get_instances(self, role: InstanceRole | None = None) -> list[PDInstance]:
        """Return the registered instances, or those of one role."""
        every = (ranks[0].instance for ranks in self.registry.instances())
        return [instance for instance in every if role is None or instance.role is role]

    # -- the configuration

    def reconfigure(self, config: SchedulerConfig, keys: Collection[str], by: str = By.START) -> None:
        """Have another configuration's values for some keys, for all requests from now on.

        Strategies that an operator has changed stay. Raise :exc:`ValueError` and change nothing if that
        cannot be.
        """
        scheduler, before = self.scheduler, self.config.model_copy()
        names = {
            role: config.strategy_of(role)
            for role, name in scheduler.strategies.names.items()
            if name == before.strategy_of(role) != config.strategy_of(role)
        }
        shadow = scheduler.strategies.shadow.name if scheduler.strategies.shadow else None
        self.config.take(config, keys)
        try:
            instances = list(self.config.instances())
            put = scheduler.strategies.prepare(names)
            put_shadow = scheduler.strategies.prepare_shadow(config.shadow_strategy)
            self.connectors.prepare(instances)
        except Exception:
            self.config.take(before, keys)
            raise
        put()
        if shadow == before.shadow_strategy != config.shadow_strategy:
            put_shadow()
        self.registry.follow(_health_policy(self.config))
        self.body_memory.resize(self.config.max_held_bytes, self.config.max_body_bytes)
        scheduler.reconfigured()
        self.dispatcher.reconfigured()
        self.membership.update(CONFIG, instances, by)
        self._use_connectors()
        self.rewrites.update(CONFIG, self.config.rewrites())
        self._core.reconfigured()

    def misfits(self) -> list[str]:
        """Return a line for each thing for which instances get nothing, as all of them are configured now."""
        return misfits(self.config, (ranks[0].instance for ranks in self.registry.instances()))

    def tell_misfits(self, by: str) -> None:
        """Make an event of each of the misfits."""
        for text in self.misfits():
            self.events.add(EventKind.CONFIG, text, by=by, level=logging.WARNING)

    def on_token_ids(self, call: Callable[[RequestContext, bytes], None]) -> None:
        """Call ``call`` for each prompt of which P tells the tokens: with these, as a JSON array."""
        self._core.prefill.ends.on_token_ids = call

    def share_hashes(self, key: int) -> None:
        """Hash prompts as every scheduler with this key, below 2**64, does: call it before any request."""
        self._core.reader.hash_key = key

    # -- requests

    def route(
        self, headers: Mapping[str, str], body: bytes, subset: frozenset[str] | None = None
    ) -> Coroutine[Any, Any, Forward | Reject]:
        """Decide where a request goes: see :meth:`.routing.core.RoutingCore.route`.

        Nothing here keeps the body, which that lets go of as soon as it can.
        """
        return self._core.route(headers, body, subset)

    def watch(self, forward: Forward, began: float) -> AnswerWatch:
        """Return what watches the answer of a request that a gateway sends on, which came at ``began``."""
        return AnswerWatch(self.in_flight, self.registry, forward, began)

    def no_memory(self, size: int, headers: Mapping[str, str]) -> Reject:
        """Return the answer to a request whose body of ``size`` bytes has no room in :attr:`body_memory`."""
        largest = self.body_memory.largest
        if size > largest:
            answer = reject(413, f"The request body is larger than {largest} bytes.", "too_large")
        else:
            answer = reject(429, "The scheduler holds too many requests.", "memory")
        self._core.refused(headers, answer)
        return answer

    def no_websocket(self, headers: Mapping[str, str]) -> Reject:
        """Return the answer to a WebSocket through a gateway that sends bodies: that one has no end."""
        message = "A WebSocket needs a route of the gateway's without the scheduler's body modes."
        answer = reject(501, message, "no_websocket")
        self._core.refused(headers, answer)
        return answer

    # -- without Envoy

    def run_health_checks(self) -> dict[str, bool]:
        """Probe every instance once; return whether each can serve, by id. Blocks up to the timeout."""
        return check_all(self._core)

    def route_request(self, body: Mapping[str, Any]) -> RouteResult:
        """Serve one request (the body of a completion or chat completion), prefill then decode.

        Blocks until the whole answer is there. Never raises for what happens to the request: see
        :attr:`RouteResult.error`. Health checks run first if none has been run yet.
        """
        return serve_one(self._core, body)


def _health_policy(config: SchedulerConfig) -> HealthPolicy:
    breaker = BreakerPolicy(
        failures=config.ejection_failures,
        success_rate=config.ejection_success_rate,
        pause=config.ejection_pause,
    )
    return HealthPolicy(
        config.unhealthy_threshold, config.healthy_threshold, breaker, config.max_ejected_share
    )
