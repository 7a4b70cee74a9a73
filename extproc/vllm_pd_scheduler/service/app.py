"""One scheduler with all its parts: the gRPC server for Envoy, the admin interface and the health checks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time

from ..admin.changes import AdminChanges
from ..admin.metaserver import Metaserver, url_for
from ..config import ConfigError, SchedulerConfig
from ..continuation.server import Continuation, Outcome
from ..discovery.source import Beside
from ..discovery.sources import Sources
from ..envoy.ext_proc import ExtProcService
from ..envoy.health import HealthService
from ..fleet.endpoint import Endpoint
from ..health import HealthMonitor
from ..models import By, InstanceRole, join_address
from ..records.events import EventKind
from ..router import PDRouter
from ..routing.going_on import Broken
from ..self_check import SelfCheck
from ..system.allocator import return_large_blocks
from ..system.open_files import raise_open_files_limit
from ..system.output import StandardStreams
from .certificates import followed
from .envoy_server import listen_for_envoy
from .instance_legs import InstanceLegs
from .listen_advice import cannot_listen
from .operator_servers import OperatorServers
from .parts import Parts
from .probes import Probes
from .reload import ConfigFile, Reload
from .sharing import join_replicas, join_workers
from .startup_error import StartupError
from .worker import Worker, scheduler_name

log = logging.getLogger(__name__)

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
            streams.count_dropped(self.router.telemetry.process.log_lines_dropped)
        self.changes = AdminChanges(self.router)
        self.changes.saves = worker is None
        self.ext_proc = ExtProcService(self.router)
        self.draining = False
        self._health = HealthService(
            lambda: self.router.membership.knows(InstanceRole.DECODE), lambda: self.draining
        )
        self._probes = Probes(self.router, self._health, self._is_ready)
        beside = Beside(self.router.objectives, self.router.rewrites)
        self._sources = Sources(config, self.router.membership, time.monotonic, beside)
        self._file = file
        self._worker = worker
        self._reload: Reload | None = None
        self._reloads: set[asyncio.Future[None]] = set()
        self._continuation: Continuation | None = None
        self._parts = Parts()

    async def __aenter__(self) -> App:
        try:
            await self._start()
        except BaseException:
            await self._parts.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    async def _start(self) -> None:
        """Start the parts, each after those that it needs. Envoy finds the scheduler ready at the end."""
        self._prepare_process()
        self._read_sources()
        self.changes.restore()
        await self._join_others()
        self._start_tracing()
        if self._worker is None:
            await self._probes.start(self._parts)
        legs = await self._reach_instances()
        self_check = legs.self_check(self.router)
        self._hear_kv_events()
        monitor = await self._watch_instances(legs)
        self._reload = self._prepare_reload(legs, monitor, self_check)
        operators = OperatorServers(
            self.router, self.changes, self_check, self._reload, self._is_ready, legs.role_switch(self.router)
        )
        if self._worker is None:
            await operators.start(self._parts)
        await self._start_metaserver()
        await self._start_continuation()
        await self._follow_sources()
        await listen_for_envoy(self.router, self.ext_proc, self._health, self._parts)
        if self._worker is not None:
            await operators.start_among(self._worker, self._probes, self._parts)
        self._spare_the_collector()
        if self._reload is not None:
            self._parts.keep_running(self._reload.watch())
        self._say_started()

    def _is_ready(self) -> bool:
        return not self.draining

    @staticmethod
    def _prepare_process() -> None:
        return_large_blocks()
        raise_open_files_limit()

    def _read_sources(self) -> None:
        try:
            self._sources.read()
        except ConfigError as error:
            raise StartupError(str(error)) from None

    async def _join_others(self) -> None:
        """Meet others of the fleet, so that what operators have changed counts from the first request on."""
        name = scheduler_name(self.config, self._worker)
        if self.config.replicas is not None:
            await join_replicas(self.config.replicas, self.router, self.changes, name, self._parts)
        elif self._worker is not None:
            await join_workers(self._worker, self.router, self.changes, name, self._parts)

    def _start_tracing(self) -> None:
        config = self.config.tracing
        if config is None:
            return
        try:
            config.check()
            from ..tracing.export import SpanExport  # its packages are an extra

            export = SpanExport(config.url(), config.sample_ratio, config.service_name)
        except ValueError as error:
            raise StartupError(f"tracing: {error}") from None
        self.router.tracer = export.tracer
        self._parts.push_async_callback(export.close)
        self._parts.callback(self.router.in_flight.close_traces)

    async def _reach_instances(self) -> InstanceLegs:
        trusted = followed("instance_tls", self.config.instance_tls, self.router.events, self._parts)
        return await InstanceLegs.start(self.router, trusted, self._parts)

    def _hear_kv_events(self) -> None:
        config, router = self.config.kv_events, self.router
        if config is None:
            return
        try:
            config.check()
        except ValueError as error:
            raise StartupError(f"kv_events: {error}") from None
        from ..kv_events.follow import KvEvents  # its package is an extra

        events = KvEvents(config, router.registry, router.telemetry)
        events.start()
        self._parts.push_async_callback(events.stop)
        router.on_token_ids(events.learn)

    async def _watch_instances(self, legs: InstanceLegs) -> HealthMonitor:
        """Check the health of all instances, and again from now on."""
        router = self.router

        def hung(endpoint: Endpoint) -> None:
            name = endpoint.instance.instance_id
            text = f"{name} hangs: it answers nothing; what waits there is given up"
            router.events.add(EventKind.STATE, text, by=By.PROBE, subject=name, level=logging.WARNING)
            legs.give_up(endpoint)

        peers = router.sync.replica.probes if router.sync is not None else None
        monitor = HealthMonitor.configured(
            self.config, router.registry, router.telemetry, legs.session, hung, peers
        )
        if peers is not None:
            peers.listener = monitor.shared
        await monitor.start()
        self._parts.push_async_callback(monitor.stop)
        router.catalog.read_again.read = monitor.read_models
        self._parts.push_async_callback(router.catalog.read_again.close)
        return monitor

    def _prepare_reload(
        self, legs: InstanceLegs, monitor: HealthMonitor, self_check: SelfCheck
    ) -> Reload | None:
        """Return what reads the configuration again, if it comes from a file."""
        if self._file is None:
            return None
        config, router = self.config, self.router

        def reconfigured() -> None:
            legs.reconfigured(config)
            monitor.reconfigured(config)
            self_check.reconfigured()
            if router.sync is not None:
                router.sync.reconfigured(config)

        return Reload(self._file, router, self._sources, reconfigured)

    async def _start_metaserver(self) -> None:
        config, decode_first = self.config, self.router.decode_first
        if config.metaserver_port is None:
            return
        tls = followed("metaserver_tls", config.metaserver_tls, self.router.events, self._parts)
        server = Metaserver(decode_first)
        await self._parts.listen("metaserver", server, config.metaserver_host, config.metaserver_port, tls)
        decode_first.listen(url_for(config))
        self._parts.push_async_callback(decode_first.close)

    async def _start_continuation(self) -> None:
        config, router = self.config, self.router
        if config.continuation_port is None:
            return

        def ended(outcome: Outcome, broken: Broken, decode: str | None) -> None:
            went_on = decode if outcome is Outcome.CONTINUED else None
            router.telemetry.decodes.stream_broke_off(outcome, broken.decode, went_on, broken.tokens)

        server = Continuation(config.continuation_ingress, router.going_on, ended)
        try:
            await server.start(config.continuation_port)
        except OSError as error:
            raise cannot_listen("continuation", "127.0.0.1", config.continuation_port, error) from None
        self._parts.push_async_callback(server.stop)
        self._continuation = server

    async def _follow_sources(self) -> None:
        """Follow where instances come from, and wait a while for what is told first."""
        await self._sources.follow()
        self._parts.push_async_callback(self._sources.stop)
        await self._sources.first_words()
        self.router.tell_misfits(By.START)

    @staticmethod
    def _spare_the_collector() -> None:
        gc.collect()
        gc.freeze()  # the collector does not look again at what the start has made: 4 % less CPU

    def _say_started(self) -> None:
        config = self.config
        grpc = config.grpc_socket or join_address(config.grpc_host, config.grpc_port)
        admin = join_address(config.admin_host, config.admin_port)
        name = f"worker {self._worker.name}: " if self._worker is not None else ""
        text = f"{name}serving ext_proc and EDS on {grpc}, admin on {admin}"
        self.router.events.add(EventKind.STARTED, text, by=By.START)

    def hang_up(self) -> None:
        """Read the configuration again, as SIGHUP asks; not while the scheduler starts or ends."""
        if self._reload is not None and not self.draining:
            reload = asyncio.ensure_future(self._reload_asked(self._reload))
            self._reloads.add(reload)
            reload.add_done_callback(self._reloads.discard)

    async def _reload_asked(self, reload: Reload) -> None:
        with contextlib.suppress(ConfigError):  # an event has told it
            await reload.reload(By.SIGNAL)

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
