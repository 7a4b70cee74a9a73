"""A real admin server on a real socket, in a thread of its own: for clients that block."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from aiohttp import web

from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.admin import AdminServer
from vllm_pd_scheduler.config import Reloaded, SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.router import PDRouter

T = TypeVar("T")

FLEET = (
    ("prefill-0", InstanceRole.PREFILL),
    ("decode-0", InstanceRole.DECODE),
    ("decode-1", InstanceRole.DECODE),
)


class AdminThread:
    """Serves the admin interface of a router with one prefill and two decode instances, which are healthy.

    ``extra`` has further GET routes, with what each answers. The router is the thread's: see ``do``.
    """

    def __init__(
        self,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        extra: dict[str, Callable[[web.Request], Any]] | None = None,
        reload: Callable[[str], Awaitable[Reloaded]] | None = None,
        **config: Any,
    ) -> None:
        self.router = PDRouter(SchedulerConfig(**config))
        for port, (name, role) in enumerate(FLEET, 8000):
            self.router.register_instance(PDInstance(name, role, "10.0.0.1", port))
            self.router.registry.probed(self.router.registry.get(name), None)
        self.server = AdminServer(self.router, is_ready=lambda: True, token=token, reload=reload)
        self.port = 0
        self._tls = tls
        self._extra = extra or {}
        self._loop = asyncio.new_event_loop()
        self._started, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    def __enter__(self) -> AdminThread:
        self._thread.start()
        assert self._started.wait(HUNG_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(HUNG_S)
        self._loop.close()

    def stop(self) -> None:
        """Stop the server."""
        self._loop.call_soon_threadsafe(self._stop.set)

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://localhost:{self.port}"

    def do(self, work: Callable[[], T]) -> T:
        """Run something in the thread of the server, and return what it returns."""

        async def run() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(HUNG_S)

    async def _run(self) -> None:
        app = self.server.application()
        for path, answer in self._extra.items():
            app.router.add_get(path, _answering(answer))
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._tls).start()
        self.port = runner.addresses[0][1]
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()


def _answering(answer: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
    async def handler(request: web.Request) -> web.StreamResponse:
        found = answer(request)
        return found if isinstance(found, web.StreamResponse) else web.json_response(found)

    return handler
