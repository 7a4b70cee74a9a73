"""A TCP proxy that can stop to forward: to both sides the other one has vanished without a word."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """Forwards connections to a port of this machine while it is not frozen, and then closes none."""

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self._target = target
        self._running = asyncio.Event()
        self._running.set()
        self._tasks: set[asyncio.Task[None]] = set()

    def freeze(self) -> None:
        """Forward nothing more, and no end of a connection."""
        self._running.clear()

    def thaw(self) -> None:
        """Forward again, what has come meanwhile too."""
        self._running.set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError):
                await self._running.wait()
                there, back = await asyncio.open_connection("127.0.0.1", self._target)
                await asyncio.gather(self._forward(reader, back), self._forward(there, writer))
        finally:
            self._tasks.discard(task)
            writer.close()  # also if nobody listens there

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._running.wait()
                sink.write(data)
                await sink.drain()
        await self._running.wait()
        sink.close()

    def close(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def proxy(port: int, target: int) -> AsyncIterator[Proxy]:
    """A proxy from one port of this machine to another."""
    made = Proxy(port, target)
    async with await asyncio.start_server(made.connected, "127.0.0.1", port):
        try:
            yield made
        finally:
            made.close()
