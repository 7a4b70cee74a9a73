"""The servers that operators ask: of one scheduler, or of several workers that are as one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..admin import AdminServer
from ..admin.changes import AdminChanges
from ..admin.others import Others
from ..admin.worker_server import WorkerServer
from ..handoff.role_switch import RoleSwitch
from ..router import PDRouter
from ..self_check import SelfCheck
from .certificates import followed
from .parts import Parts
from .probes import Probes
from .reload import Reload
from .startup_error import StartupError
from .worker import FirstWorker, Worker

log = logging.getLogger(__name__)

LEAD_AGAIN_S = 1.0
"""Pause before a worker tries again to listen where the first one has listened that has ended."""


class OperatorServers:
    """The admin interface and, of workers, what the first of them has for all: the probes, too."""

    def __init__(
        self,
        router: PDRouter,
        changes: AdminChanges,
        self_check: SelfCheck,
        reload: Reload | None,
        is_ready: Callable[[], bool],
        switch: RoleSwitch,
    ) -> None:
        self._router = router
        self._changes = changes
        self._self_check = self_check
        self._reload = reload.reload if reload is not None else None
        self._is_ready = is_ready
        self._switch = switch

    async def start(self, parts: Parts, others: Others | None = None) -> None:
        """Listen where operators ask, and check pairs from now on."""
        parts.keep_running(self._self_check.run())
        config = self._router.config
        token = config.admin_token.read() if config.admin_token else None
        tls = followed("admin_tls", config.admin_tls, self._router.events, parts)
        admin = AdminServer(
            self._router,
            self._changes,
            is_ready=self._is_ready,
            token=token,
            reload=self._reload,
            self_check=self._self_check,
            others=others,
            switch=self._switch,
        )
        await parts.listen("admin", admin, config.admin_host, config.admin_port, tls)

    async def start_among(self, worker: Worker, probes: Probes, parts: Parts) -> None:
        """Answer the first of several workers; be that one if no other is, or when that one has ended."""
        own = WorkerServer(
            self._router,
            self._changes,
            is_ready=self._is_ready,
            reload=self._reload,
            self_check=self._self_check,
        )
        await own.start_on_socket(worker.admin)
        parts.push_async_callback(own.stop)
        first = FirstWorker(worker)
        if first.now():
            await self._lead(worker, probes, parts)
        else:
            parts.keep_running(self._succeed(first, worker, probes, parts))

    async def _succeed(self, first: FirstWorker, worker: Worker, probes: Probes, parts: Parts) -> None:
        await first.wait()
        log.info("worker %s has the admin interface now", worker.name)
        said = ""
        while True:
            async with Parts() as led:
                try:
                    await self._lead(worker, probes, led)
                    parts.push_async_callback(led.pop_all().aclose)
                    return
                except StartupError as error:
                    if str(error) != said:
                        said = str(error)
                        log.error("%s; it is tried again each second", said)
            await asyncio.sleep(LEAD_AGAIN_S)

    async def _lead(self, worker: Worker, probes: Probes, parts: Parts) -> None:
        """Listen where only one process can, answer for all workers there, and write their files."""
        self._changes.saves = True
        others = Others(worker.name, worker.others, worker.counts)
        parts.push_async_callback(others.close)
        await probes.start(parts, others)
        await self.start(parts, others)
