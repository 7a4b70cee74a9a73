"""The scheduler as a process: ``/version``, ``/status``, ``/config`` and ``/log-level``."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Literal

from aiohttp import web

from .. import __version__
from ..config import SchedulerConfig
from ..models import InstanceRole
from ..records.events import EventKind
from ..request.headers import ENVOY_CONFIG_VERSION
from ..router import PDRouter
from .others import Others
from .route import Body, Route, Shown, asked_by, json_answer

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class VersionAnswer(Shown):
    """Which scheduler this is."""

    version: str
    python: str
    envoy_config: str
    """Version of ``envoy/envoy.yaml`` that this scheduler works with."""
    started_at: datetime
    uptime_s: float


class StrategiesInUse(Shown):
    """The strategy of each role."""

    prefill: str
    decode: str


class SettingsInUse(Shown):
    """What else decides where requests go: what the preset has set, or the configuration."""

    preset: str | None
    disaggregation: str | int
    late_binding: bool


class QueueStatus(Shown):
    """What waits in the scheduler."""

    requests: int
    bytes: int
    requests_elsewhere: int
    """Those that wait in the queues of its other replicas, as these tell."""


class RoleStatus(Shown):
    """The instances of a role, by number."""

    total: int
    routable: int
    """Those that can take a request."""


class RolesStatus(Shown):
    """The instances, by number."""

    prefill: RoleStatus
    decode: RoleStatus
    encode: RoleStatus


class OtherReplica(Shown):
    """Another replica of the scheduler."""

    replica: str
    name: str
    """As it is configured; empty if it is not, or not known yet."""
    machine: str
    version: str
    silent_s: float
    """Seconds since something was heard of it."""
    differs: bool
    """Whether it is configured in another way."""


class ReplicasStatus(Shown):
    """This scheduler among others."""

    replica: str
    """This one."""
    connected: bool
    problem: str
    """Why it is not connected, and what to do."""
    others: list[OtherReplica]


class StatusAnswer(Shown):
    """How the scheduler is."""

    version: str
    started_at: datetime
    uptime_s: float
    ready: bool
    """Whether it can serve: it is not draining, and a D can serve."""
    strategy: StrategiesInUse
    settings: SettingsInUse
    shadow: str | None
    queue: QueueStatus
    held_bytes: int
    """Bytes of all bodies between arrival and decode."""
    roles: RolesStatus
    misfits: list[str]
    """Why instances get nothing that are right by themselves: a line for each reason."""
    replicas: ReplicasStatus | None
    """The other replicas, if this is one of several."""


class LogLevelBody(Body):
    """From which level on to log."""

    level: LogLevel


class LogLevelAnswer(Shown):
    """From which level on is logged."""

    level: str


class ProcessApi:
    """Shows the process and what it runs with, and changes what it logs.

    ``is_ready`` returns ``False`` once the scheduler is shutting down. With ``others`` this is about
    all workers.
    """

    def __init__(self, router: PDRouter, is_ready: Callable[[], bool], others: Others | None = None) -> None:
        self._router = router
        self._others = others
        self._is_ready = is_ready
        self._started_at = datetime.now(UTC)
        self._started = time.monotonic()

    def routes(self) -> Iterator[Route]:
        """Return the routes."""
        level = {200: LogLevelAnswer}
        yield Route(
            "GET", "/version", "The version, and how long it runs", self._version, {200: VersionAnswer}
        )
        yield Route("GET", "/status", "The scheduler at a glance", self._status, {200: StatusAnswer})
        yield Route(
            "GET", "/config", "The configuration, without secrets", self._config, {200: SchedulerConfig}
        )
        yield Route("GET", "/log-level", "What is logged", self._log_level, level)
        yield Route("PUT", "/log-level", "Change what is logged", self._set_log_level, level)

    async def _version(self, _: web.Request) -> web.Response:
        return json_answer(
            VersionAnswer(
                version=__version__,
                python=platform.python_version(),
                envoy_config=ENVOY_CONFIG_VERSION,
                started_at=self._started_at,
                uptime_s=self._uptime_s(),
            )
        )

    async def _status(self, _: web.Request) -> web.Response:
        return json_answer(await self.status_of_all())

    async def status_of_all(self) -> StatusAnswer:
        """Return how all workers are now: what they hold is a sum."""
        status = self.status()
        if self._others is None:
            return status
        told = [StatusAnswer.model_validate_json(body) for body in await self._others.get("/status")]
        every = [status, *told]
        waiting = sum(each.queue.requests for each in every)
        known = status.queue.requests + status.queue.requests_elsewhere  # those of other workers too
        queue = QueueStatus(
            requests=waiting,
            bytes=sum(each.queue.bytes for each in every),
            requests_elsewhere=max(0, known - waiting),
        )
        update = {"queue": queue, "held_bytes": sum(each.held_bytes for each in every)}
        return status.model_copy(update=update)

    def status(self) -> StatusAnswer:
        """Return how the scheduler is now."""
        used, queue = self._router.scheduler.strategies, self._router.dispatcher.queue
        config = self._router.config
        serves = bool(self._router.registry.routable(InstanceRole.DECODE))
        prefill, decode, encode = map(self._role, InstanceRole)
        return StatusAnswer(
            version=__version__,
            started_at=self._started_at,
            uptime_s=self._uptime_s(),
            ready=self._is_ready() and serves,
            strategy=StrategiesInUse(**{role.value: name for role, name in used.names.items()}),
            settings=SettingsInUse(
                preset=config.preset,
                disaggregation=config.disaggregation,
                late_binding=config.late_binding,
            ),
            shadow=used.shadow.name if used.shadow else None,
            queue=QueueStatus(
                requests=len(queue),
                bytes=queue.bytes,
                requests_elsewhere=sum(self._router.registry.elsewhere.waiting),
            ),
            held_bytes=self._router.body_memory.used,
            roles=RolesStatus(prefill=prefill, decode=decode, encode=encode),
            misfits=self._router.misfits(),
            replicas=self._replicas(),
        )

    def _replicas(self) -> ReplicasStatus | None:
        sync = self._router.sync
        if sync is None:
            return None
        known, differing = sync.greetings.known, sync.greetings.differing()
        others = []
        for name, silent in sync.replica.silent_for(self._router.clock()).items():
            said = known.get(name)
            other = OtherReplica(
                replica=name,
                name=said.name if said else "",
                machine=said.machine if said else "",
                version=said.version if said else "",
                silent_s=round(silent, 3),
                differs=name in differing,
            )
            others.append(other)
        problem = sync.channel.problem
        return ReplicasStatus(
            replica=sync.replica.name, connected=not problem, problem=problem, others=others
        )

    def _role(self, role: InstanceRole) -> RoleStatus:
        registry = self._router.registry
        return RoleStatus(total=len(registry.endpoints(role)), routable=len(registry.routable(role)))

    def _uptime_s(self) -> float:
        return round(time.monotonic() - self._started, 3)

    async def _config(self, _: web.Request) -> web.Response:
        return web.json_response(self._router.config.masked())

    async def _log_level(self, _: web.Request) -> web.Response:
        return json_answer(LogLevelAnswer(level=logging.getLevelName(logging.getLogger().level)))

    async def _set_log_level(self, request: web.Request, body: LogLevelBody) -> web.Response:
        logging.getLogger().setLevel(body.level)
        text = f"log level is {body.level}"
        self._router.events.add(EventKind.LOG_LEVEL, text, by=asked_by(request))
        if self._others is not None:
            await self._others.pass_on(request)
        return await self._log_level(request)
