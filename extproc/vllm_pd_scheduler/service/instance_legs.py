"""What the scheduler itself sends to instances."""

from __future__ import annotations

import ssl
import time

import aiohttp

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..handoff.abort import HttpAbort
from ..handoff.prefill_leg import LISTENER_IDLE_S, HttpPrefill
from ..handoff.questions import Questions
from ..handoff.release import HandoffReleaser
from ..handoff.role_switch import RoleSwitch
from ..handoff.traced_leg import TracedLeg
from ..instance_http.pool import ConnectionPool
from ..instance_http.session import open_session
from ..router import PDRouter
from ..self_check import SelfCheck
from ..self_check.pair_check import PairCheck
from .parts import Parts


class InstanceLegs:
    """The legs of a router's requests that go to instances without Envoy, and the connections for them."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        pool: ConnectionPool,
        prefill: HttpPrefill,
        encode: HttpPrefill,
        questions: Questions,
    ) -> None:
        self.session = session
        """For what is asked of them beside requests."""
        self._pool = pool
        self._prefill = prefill
        self._encode = encode
        self._questions = questions

    @classmethod
    async def start(cls, router: PDRouter, trusted: ssl.SSLContext | None, parts: Parts) -> InstanceLegs:
        """Return those that a router uses from now on, over TLS that trusts as a context does."""
        config = router.config
        session = await parts.enter_async_context(open_session(trusted))
        pool = await parts.enter_async_context(ConnectionPool(trusted))
        releaser = HandoffReleaser(pool, router.registry, router.telemetry, router.scheduler.fitting)
        router.in_flight.handoffs.release = releaser
        parts.push_async_callback(releaser.close)
        prefill_pool = pool
        if config.prefill_listener is not None:
            prefill_pool = await parts.enter_async_context(ConnectionPool(idle_s=LISTENER_IDLE_S))
        prefill = HttpPrefill(
            prefill_pool, config.prefill_listener, config.prefill_timeout, releaser.unwanted
        )
        router.prefill_leg = prefill if router.tracer is None else TracedLeg(prefill, time.monotonic)
        parts.push_async_callback(prefill.close)
        router.abort_leg = abort = HttpAbort(pool)
        parts.push_async_callback(abort.close)
        encode = HttpPrefill(pool, None, config.encode_timeout)
        router.encode_leg = encode.send
        router.ask_prefill = questions = Questions(session, router.registry)
        parts.push_async_callback(questions.close)
        return cls(session, pool, prefill, encode, questions)

    def give_up(self, endpoint: Endpoint) -> None:
        """Wait no more for what was sent to an endpoint."""
        self._prefill.give_up(endpoint)
        self._encode.give_up(endpoint)

    def reconfigured(self, config: SchedulerConfig) -> None:
        """Wait as long as is configured now."""
        self._prefill.timeout, self._encode.timeout = config.prefill_timeout, config.encode_timeout

    def role_switch(self, router: PDRouter) -> RoleSwitch:
        """Return what tells an engine that it has another role."""
        return RoleSwitch(self._pool, router.connectors)

    def self_check(self, router: PDRouter) -> SelfCheck:
        """Return what sends a pair of P and D requests of our own, once its ``run`` is started."""
        pair = PairCheck(
            router.config,
            router.registry,
            router.connectors,
            router.in_flight,
            router.telemetry,
            self._pool,
            self._prefill,
            self._questions,
            router.clock,
        )
        return SelfCheck(
            router.config,
            router.scheduler,
            router.telemetry,
            router.events,
            pair,
            lambda: len(router.dispatcher.queue),
            router.clock,
            time.time,
        )
