"""The parts of a scheduler that run."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from ..admin.http_server import HttpServer
from .listen_advice import cannot_listen


class Parts(AsyncExitStack):
    """Parts that run. They end with this block, the newest first."""

    def keep_running(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin something that runs until it is cancelled at the end."""
        self.push_async_callback(_ended, asyncio.ensure_future(work))

    async def listen(
        self, name: str, server: HttpServer, host: str, port: int, tls: ssl.SSLContext | None = None
    ) -> None:
        """Have a server listen until the end; raise :exc:`.StartupError` naming its port if it cannot."""
        try:
            await server.start(host, port, tls)
        except OSError as error:
            raise cannot_listen(name, host, port, error) from None
        self.push_async_callback(server.stop)


async def _ended(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
