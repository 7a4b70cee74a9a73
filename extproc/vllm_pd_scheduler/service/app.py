"""One scheduler with all its parts: the gRPC server for Envoy, the admin interface and the health checks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import ssl
import time
from contextlib import AsyncExitStack

from ..admin import AdminServer
from ..admin.changes import AdminChanges
from ..admin.http_server import HttpServer
from ..admin.metaserver import Metaserver, url_for
from ..admin.others import Others
from ..admin.probes_server import ProbesServer
from ..admin.worker_server import WorkerServer
from ..config import (
    ConfigError,
    KvEventsConfig,
    ReplicasConfig,
    SchedulerConfig,
    TracingConfig,
    is_loopback,
)
from ..continuation.server import Continuation, Outcome
from ..discovery.source import Beside
from ..discovery.sources import Sources
from ..envoy.access_log import AccessLog
from ..envoy.eds import EndpointDiscovery
from ..envoy.ext_proc import ExtProcService
from ..envoy.health import HealthService
from ..envoy.retries import RetryCheck
from ..fleet.endpoint import Endpoint
from ..handoff.abort import HttpAbort
from ..handoff.interfaces import AskPrefill, PrefillLeg
from ..handoff.prefill_leg import LISTENER_IDLE_S, HttpPrefill
from ..handoff.questions import Questions
from ..handoff.release import HandoffReleaser
from ..handoff.role_switch import RoleSwitch
from ..handoff.traced_leg import TracedLeg
from ..health import HealthMonitor
from ..instance_http.pool import ConnectionPool
from ..instance_http.session import open_session
from ..models import By, InstanceRole, join_address
from ..records.events import EventKind
from ..router import PDRouter
from ..routing.going_on import Broken
from ..rpc import ListenError, Server
from ..self_check import SelfCheck
from ..self_check.pair_check import PairCheck
from ..sync.channel import Channel
from ..sync.local import LocalChannel
from ..system.allocator import return_large_blocks
from ..system.open_files import raise_open_files_limit
from ..system.output import StandardStreams
from .certificates import Certificates, TlsSettings
from .listen_advice import listen_advice
from .reload import ConfigFile, Reload
from .sharing import JOIN_S, join
from .startup_error import StartupError
from .watchdog import LoopWatchdog
from .worker import FirstWorker, Worker, scheduler_name

log = logging.getLogger(__name__)

LEAD_AGAIN_S = 1.0
"""Pause before a worker tries again to listen where the first one has listened that has ended."""

REFUSE_AFTER = 0.5
"""Share of ``drain_timeout`` after which requests in the queue are refused.

Served later than that, their answers would be cut at the end of the drain.
"""


class App:
    """A scheduler that starts, serves, drains and stops.

    ``async with App(config) as app:`` starts it and serves. The end of the block stops it at once; call
    ``drain`` before that to let running requests end. Lines of output that ``streams`` drop are counted in
    its metrics. The configuration can be read again if it comes from a ``file``. ``worker`` is which of
    several it is: the first of them has the admin interface of all.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        streams: StandardStreams | None = None,
        file: ConfigFile | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.config = config
        self.router = PDRouter(config, name=scheduler_name(config, worker))
        if streams is not None:
            streams.count_dropped(self.router.telemetry.log_lines_dropped)
        self.changes = AdminChanges(self.router)
        self.changes.saves = worker is None
        self.ext_proc = ExtProcService(self.router)
        self.draining = False
        self._health = HealthService(
            lambda: self.router.membership.knows(InstanceRole.DECODE), lambda: self.draining
        )
        beside = Beside(self.router.objectives, self.router.rewrites)
        self._sources = Sources(config, self.router.membership, time.monotonic, beside)
        self._file = file
        self._worker = worker
        self._reload: Reload | None = None
        self._reloads: set[asyncio.Future[None]] = set()
        self._continuation: Continuation | None = None
        self._switch: RoleSwitch | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> App:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        """Start the parts, each after those that it needs. Envoy finds the scheduler ready at the end."""
        config, router = self.config, self.router
        return_large_blocks()
        raise_open_files_limit()
        try:
            self._sources.read()
        except ConfigError as error:
            raise StartupError(str(error)) from None
        self.changes.restore()
        if config.replicas is not None:
            await self._join_replicas(config.replicas)
        elif self._worker is not None:
            self.changes.file_first = True
            await self._join(LocalChannel(self._worker.hub), "workers", self._worker.read_secret())
        if config.tracing is not None:
            self._start_tracing(config.tracing)
        if self._worker is None:
            await self._start_health(self._stack)
        trusted = self._certificates("instance_tls", config.instance_tls)
        session = await self._stack.enter_async_context(open_session(trusted))
        pool = await self._stack.enter_async_context(ConnectionPool(trusted))
        releaser = HandoffReleaser(pool, router.registry, router.telemetry, router.scheduler.fitting)
        router.in_flight.release_handoff = releaser
        self._stack.push_async_callback(releaser.close)
        leg_pool = pool
        if config.prefill_listener is not None:
            leg_pool = await self._stack.enter_async_context(ConnectionPool(idle_s=LISTENER_IDLE_S))
        router.prefill_leg = leg = HttpPrefill(
            leg_pool, config.prefill_listener, config.prefill_timeout, releaser.unwanted
        )
        self._stack.push_async_callback(leg.close)
        router.abort_leg = abort = HttpAbort(pool)
        self._switch = RoleSwitch(pool, router.connectors)
        self._stack.push_async_callback(abort.close)
        router.encode_leg = (encode_leg := HttpPrefill(pool, None, config.encode_timeout)).send
        router.ask_prefill = questions = Questions(session, router.registry)
        self._stack.push_async_callback(questions.close)
        if router.tracer is not None:
            router.prefill_leg = TracedLeg(leg, time.monotonic)
        self_check = self._start_self_check(leg, questions, pool)

        def hung(endpoint: Endpoint) -> None:
            name = endpoint.instance.instance_id
            text = f"{name} hangs: it answers nothing; what waits there is given up"
            router.events.add(EventKind.STATE, text, by=By.PROBE, subject=name, level=logging.WARNING)
            leg.give_up(endpoint)
            encode_leg.give_up(endpoint)

        if config.kv_events is not None:
            self._start_kv_events(config.kv_events)
        peers = router.sync.replica.probes if router.sync is not None else None
        monitor = HealthMonitor.configured(config, router.registry, router.telemetry, session, hung, peers)
        if peers is not None:
            peers.listener = monitor.shared
        await monitor.start()
        self._stack.push_async_callback(monitor.stop)
        router.catalog.read_again.read = monitor.read_models
        self._stack.push_async_callback(router.catalog.read_again.close)

        def reconfigured() -> None:
            leg.timeout, encode_leg.timeout = config.prefill_timeout, config.encode_timeout
            monitor.reconfigured(config)
            self_check.reconfigured()
            if router.sync is not None:
                router.sync.reconfigured(config)

        if self._file is not None:
            self._reload = Reload(self._file, router, self._sources, reconfigured)
        if self._worker is None:
            await self._start_admin(self._stack, self_check)
        await self._start_metaserver()
        await self._start_continuation()
        await self._sources.follow()
        self._stack.push_async_callback(self._sources.stop)
        await self._sources.first_words()
        router.tell_misfits(By.START)
        await self._start_grpc()
        if self._worker is not None:
            await self._start_among(self._worker, self_check)
        gc.collect()
        gc.freeze()  # the collector does not look again at what the start has made: 4 % less CPU
        if self._reload is not None:
            watch = asyncio.ensure_future(self._reload.watch())
            self._stack.push_async_callback(_ended, watch)
        grpc = config.grpc_socket or join_address(config.grpc_host, config.grpc_port)
        admin = join_address(config.admin_host, config.admin_port)
        name = f"worker {self._worker.name}: " if self._worker is not None else ""
        text = f"{name}serving ext_proc and EDS on {grpc}, admin on {admin}"
        router.events.add(EventKind.STARTED, text, by=By.START)

    def hang_up(self) -> None:
        """Read the configuration again, as SIGHUP asks; not while the scheduler starts or ends."""
        if self._reload is not None and not self.draining:
            reload = asyncio.ensure_future(self._reload_asked(self._reload))
            self._reloads.add(reload)
            reload.add_done_callback(self._reloads.discard)

    async def _reload_asked(self, reload: Reload) -> None:
        with contextlib.suppress(ConfigError):  # an event has told it
            await reload.reload(By.SIGNAL)

    def _certificates(self, key: str, settings: TlsSettings | None) -> ssl.SSLContext | None:
        """Return the context for a setting, whose files are followed from now on."""
        if settings is None:
            return None
        certificates = Certificates(key, settings, self.router.events)
        self._stack.push_async_callback(_ended, asyncio.ensure_future(certificates.follow()))
        return certificates.context

    async def _start_health(self, stack: AsyncExitStack, others: Others | None = None) -> None:
        """Listen where health is asked for and nothing else, before the sources have told anything."""
        config = self.config
        if config.metrics_port is not None:
            probes = ProbesServer(self.router, lambda: not self.draining, others)
            await self._listen(stack, "metrics", probes, config.metrics_host, config.metrics_port)
        if config.grpc_health_port is None:
            return
        server = Server(self._health.methods())
        try:
            await server.listen(config.grpc_host, config.grpc_health_port)
        except ListenError as error:
            advice = listen_advice("grpc_health", config.grpc_health_port, error.errno, "grpc_host")
            raise StartupError(f"grpc_health_port: {error}{advice}") from None
        stack.push_async_callback(server.stop)

    def _start_tracing(self, config: TracingConfig) -> None:
        try:
            config.check()
            from ..tracing.export import SpanExport  # its packages are an extra

            export = SpanExport(config.url(), config.sample_ratio, config.service_name)
        except ValueError as error:
            raise StartupError(f"tracing: {error}") from None
        self.router.tracer = export.tracer
        self._stack.push_async_callback(export.close)
        self._stack.callback(self.router.in_flight.close_traces)

    async def _join_replicas(self, config: ReplicasConfig) -> None:
        """Meet the other replicas, so that what operators have changed counts from the first request on."""
        try:
            config.check()
            from ..sync.valkey import Valkey  # its package is an extra
        except ValueError as error:
            raise StartupError(f"replicas: {error}") from None
        meeting = config.meeting()
        tls = self._certificates("replicas.tls", config.tls_settings()) if meeting.tls else None
        secret = config.password.read() if config.password is not None else ""
        await self._join(Valkey(config, tls), meeting.fleet(config.key), secret)

    async def _join(self, channel: Channel, fleet: str, secret: str) -> None:
        name = scheduler_name(self.config, self._worker)
        sync = join(self.router, self.changes, channel, fleet, name, secret)
        self._stack.push_async_callback(_ended, asyncio.ensure_future(sync.run()))
        await sync.joined(JOIN_S)

    def _start_kv_events(self, config: KvEventsConfig) -> None:
        try:
            config.check()
        except ValueError as error:
            raise StartupError(f"kv_events: {error}") from None
        from ..kv_events.follow import KvEvents  # its package is an extra

        router = self.router
        events = KvEvents(config, router.registry, router.telemetry)
        events.start()
        self._stack.push_async_callback(events.stop)
        router.on_token_ids(events.learn)

    def _start_self_check(self, leg: PrefillLeg, ask: AskPrefill, pool: ConnectionPool) -> SelfCheck:
        router, config = self.router, self.config
        pair = PairCheck(
            config,
            router.registry,
            router.connectors,
            router.in_flight,
            router.telemetry,
            pool,
            leg,
            ask,
            router.clock,
        )
        check = SelfCheck(
            config,
            router.scheduler,
            router.telemetry,
            router.events,
            pair,
            lambda: len(router.dispatcher.queue),
            router.clock,
            time.time,
        )
        return check

    async def _start_admin(
        self, stack: AsyncExitStack, self_check: SelfCheck, others: Others | None = None
    ) -> None:
        """Listen where operators ask, and check pairs from now on."""
        stack.push_async_callback(_ended, asyncio.ensure_future(self_check.run()))
        config = self.config
        token = config.admin_token.read() if config.admin_token else None
        tls = self._certificates("admin_tls", config.admin_tls)
        reload = self._reload.reload if self._reload is not None else None
        admin = AdminServer(
            self.router,
            self.changes,
            is_ready=lambda: not self.draining,
            token=token,
            reload=reload,
            self_check=self_check,
            others=others,
            switch=self._switch,
        )
        await self._listen(stack, "admin", admin, config.admin_host, config.admin_port, tls)

    async def _start_among(self, worker: Worker, self_check: SelfCheck) -> None:
        """Answer the first of several workers; be that one if no other is, or when that one has ended."""
        own = WorkerServer(
            self.router,
            self.changes,
            is_ready=lambda: not self.draining,
            reload=self._reload.reload if self._reload is not None else None,
            self_check=self_check,
        )
        await own.start_on_socket(worker.admin)
        self._stack.push_async_callback(own.stop)
        first = FirstWorker(worker)
        if first.now():
            await self._lead(self._stack, worker, self_check)
        else:
            succession = asyncio.ensure_future(self._succeed(first, worker, self_check))
            self._stack.push_async_callback(_ended, succession)

    async def _succeed(self, first: FirstWorker, worker: Worker, self_check: SelfCheck) -> None:
        await first.wait()
        log.info("worker %s has the admin interface now", worker.name)
        said = ""
        while True:
            async with AsyncExitStack() as stack:
                try:
                    await self._lead(stack, worker, self_check)
                    self._stack.push_async_callback(stack.pop_all().aclose)
                    return
                except StartupError as error:
                    if str(error) != said:
                        said = str(error)
                        log.error("%s; it is tried again each second", said)
            await asyncio.sleep(LEAD_AGAIN_S)

    async def _lead(self, stack: AsyncExitStack, worker: Worker, self_check: SelfCheck) -> None:
        """Listen where only one process can, answer for all workers there, and write their files."""
        self.changes.saves = True
        others = Others(worker.name, worker.others, worker.counts)
        stack.push_async_callback(others.close)
        await self._start_health(stack, others)
        await self._start_admin(stack, self_check, others)

    async def _start_metaserver(self) -> None:
        config, decode_first = self.config, self.router.decode_first
        if config.metaserver_port is None:
            return
        tls = self._certificates("metaserver_tls", config.metaserver_tls)
        server = Metaserver(decode_first)
        await self._listen(
            self._stack, "metaserver", server, config.metaserver_host, config.metaserver_port, tls
        )
        decode_first.listen(url_for(config))
        self._stack.push_async_callback(decode_first.close)

    async def _start_continuation(self) -> None:
        config = self.config
        if config.continuation_port is None:
            return
        router = self.router

        def ended(outcome: Outcome, broken: Broken, decode: str | None) -> None:
            went_on = decode if outcome is Outcome.CONTINUED else None
            router.telemetry.stream_broke_off(outcome, broken.decode, went_on, broken.tokens)

        server = Continuation(config.continuation_ingress, router.going_on, ended)
        try:
            await server.start(config.continuation_port)
        except OSError as error:
            advice = listen_advice("continuation", config.continuation_port, error.errno)
            where = join_address("127.0.0.1", config.continuation_port)
            words = os.strerror(error.errno or 0)
            raise StartupError(f"continuation_port: cannot listen on {where}: {words}{advice}") from None
        self._stack.push_async_callback(server.stop)
        self._continuation = server

    async def _listen(
        self,
        stack: AsyncExitStack,
        name: str,
        server: HttpServer,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        try:
            await server.start(host, port, tls)
        except OSError as error:
            # Not error.strerror of a server that asyncio could not start: it has the address once more.
            why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
            advice = listen_advice(name, port, error.errno)
            where = join_address(host, port)
            raise StartupError(f"{name}_port: cannot listen on {where}: {why}{advice}") from None
        stack.push_async_callback(server.stop)

    async def _start_grpc(self) -> None:
        config = self.config
        in_flight = self.router.in_flight
        access_log = AccessLog(in_flight.attempt_failed, in_flight.told, in_flight.is_for_us)
        retries = RetryCheck(
            in_flight.may_try_again,
            self.router.again,
            in_flight.in_vain,
            config.max_body_bytes,
        )
        discovery = EndpointDiscovery(self.router.registry, self.router.membership.knows)
        services = (self.ext_proc, discovery, access_log, retries, self._health)
        server = Server({path: method for each in services for path, method in each.methods().items()})
        try:
            if config.grpc_socket is not None:
                await server.listen_on_socket(config.grpc_socket)
            else:
                tls = self._certificates("grpc_tls", config.grpc_tls)
                await server.listen(config.grpc_host, config.grpc_port, tls)
        except ListenError as error:
            if config.grpc_socket is not None:
                raise StartupError(f"grpc_socket: {error}") from None
            advice = listen_advice("grpc", config.grpc_port, error.errno)
            raise StartupError(f"grpc_port: {error}{advice}") from None
        if config.grpc_socket is None and not config.grpc_tls and not is_loopback(config.grpc_host):
            log.warning(
                "grpc_host %s can be reached from other machines and grpc_tls is not set: whoever reaches "
                "port %d can have the instances' addresses and API keys, and prompts pass in clear",
                config.grpc_host,
                config.grpc_port,
            )
        self._stack.push_async_callback(server.stop)
        telemetry = self.router.telemetry
        watchdog = LoopWatchdog(telemetry.event_loop_stalled, telemetry.event_loop_late)
        watchdog.start()
        self._stack.callback(watchdog.stop)

    def say_draining(self) -> None:
        """Make an event of a drain that begins, as a signal has asked."""
        text = f"draining: {self.ext_proc.open_streams} requests in flight"
        self.router.events.add(EventKind.DRAINING, text, by=By.SIGNAL)

    async def drain(self) -> bool:
        """Report not ready and wait until every answer has ended.

        Return ``False`` if some have not after ``drain_timeout``.
        """
        self.draining = True
        timeout = self.config.drain_timeout
        refuse = asyncio.get_running_loop().call_later(REFUSE_AFTER * timeout, self.router.dispatcher.close)
        try:
            async with asyncio.timeout(timeout):
                await self.ext_proc.idle()
                await self.router.decode_first.idle()
                if self._continuation is not None:
                    await self._continuation.idle()
        except TimeoutError:
            running = self.ext_proc.open_streams or len(self.router.decode_first)
            log.warning("%d requests still run after drain_timeout (%g s)", running, timeout)
            return False
        finally:
            refuse.cancel()
        return True


async def _ended(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
