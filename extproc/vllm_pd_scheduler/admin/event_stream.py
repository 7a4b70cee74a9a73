"""Streams of server-sent events: bounded, and ended when the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from aiohttp import web

MEDIA_TYPE = "text/event-stream"

KEEP_ALIVE_S = 15.0
"""Seconds of silence after which a comment is sent: proxies cut what is silent for 30 or 60 s."""

SLOW_S = 10.0
"""Seconds that a reader may take for what it was sent. One that takes longer is cut off.

It then reads again from the last number that it has seen, if it is not dead.
"""

MAX_RELAYED = 200
"""Events of other streams that wait for a reader: they are read no further meanwhile."""

Subscribe = Callable[[Callable[[], None]], Callable[[], None]]
"""Has a listener called whenever there may be something new; returns what ends that."""


class Streams:
    """The streams of one server.

    Each reader pulls: while it is busy with one chunk nothing is put by for it.
    """

    def __init__(self) -> None:
        self._wakers: set[Callable[[], None]] = set()
        self._ended = False

    async def serve(
        self,
        request: web.Request,
        subscribe: Subscribe,
        read: Callable[[], bytes],
        others: AsyncIterator[bytes] | None = None,
    ) -> web.StreamResponse:
        """Send what ``read`` returns until the reader leaves or the server stops.

        ``read`` returns what is new since its last call, and nothing if nothing is. It is called at the start
        and when ``subscribe``'s listener was called. What ``others`` yield is sent too.
        """
        response = web.StreamResponse(headers={"content-type": MEDIA_TYPE, "cache-control": "no-store"})
        await response.prepare(request)
        news = asyncio.Event()
        news.set()
        unsubscribe = subscribe(news.set)
        self._wakers.add(news.set)
        relay = Relay(others, news.set) if others is not None else None
        try:
            await self._run(response, news, read if relay is None else lambda: read() + relay.read())
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()  # not closed: that would wait until the reader takes what is left
        finally:
            if relay is not None:
                await relay.end()
            unsubscribe()
            self._wakers.discard(news.set)
        return response

    async def _run(
        self, response: web.StreamResponse, news: asyncio.Event, read: Callable[[], bytes]
    ) -> None:
        await response.write(b": hello\n\n")  # the head of the answer goes with the first chunk
        while not self._ended:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    await news.wait()
                chunk = read()
            except TimeoutError:
                chunk = b": still here\n\n"
            news.clear()
            while chunk and not self._ended:
                async with asyncio.timeout(SLOW_S):
                    await response.write(chunk)
                chunk = read()

    async def end(self, _: web.Application) -> None:
        """End all streams, and those that begin later at once."""
        self._ended = True
        for wake in self._wakers:
            wake()


class Relay:
    """Takes in what other streams yield, for one reader, whom ``wake`` wakes."""

    def __init__(self, events: AsyncIterator[bytes], wake: Callable[[], None]) -> None:
        self._chunks: list[bytes] = []
        self._taken = asyncio.Event()
        self._wake = wake
        self._task = asyncio.ensure_future(self._run(events))

    async def _run(self, events: AsyncIterator[bytes]) -> None:
        async for event in events:
            self._chunks.append(event)
            self._wake()
            if len(self._chunks) >= MAX_RELAYED:
                self._taken.clear()
                await self._taken.wait()

    def read(self) -> bytes:
        """Return what has come since the last call."""
        chunks, self._chunks = self._chunks, []
        self._taken.set()
        return b"".join(chunks)

    async def end(self) -> None:
        """Take in nothing more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def encode(data: str, number: int | None = None, event: str | None = None) -> bytes:
    """Return one server-sent event; ``data`` is one line."""
    lines = [f"id: {number}"] * (number is not None) + [f"event: {event}"] * (event is not None)
    return "\n".join([*lines, f"data: {data}", "", ""]).encode()
