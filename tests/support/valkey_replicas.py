"""Channels by a Valkey or Redis server, as several replicas have them, and what they hear."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from tests.support.heard import Heard
from tests.support.waiting import until
from vllm_pd_scheduler.config import ReplicasConfig
from vllm_pd_scheduler.sync.valkey import Valkey


class Replica:
    """A channel, and what it has heard."""

    def __init__(self, url: str, *, context: ssl.SSLContext | None = None, **settings: Any) -> None:
        self.heard = Heard()
        self.channel = Valkey(ReplicasConfig(url=url, **settings), context)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        task = asyncio.ensure_future(self.channel.run(self.heard))
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def connected(self) -> None:
        await until(lambda: not self.channel.problem)

    async def says(self, problem: str) -> None:
        await until(lambda: problem in self.channel.problem)


@asynccontextmanager
async def replicas(count: int, url: str, **settings: Any) -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(Replica(url, **settings).running()) for _ in range(count)]
        for each in made:
            await each.connected()
        yield made
