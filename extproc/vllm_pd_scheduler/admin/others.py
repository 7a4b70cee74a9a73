"""The other workers of this machine, whom the first one asks so that it can answer for all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from ..advice.seen import Seen
from ..records.series import Reading
from .metrics_page import as_one_page
from .summed_metrics import Counted, SummedMetrics

READING_PATH = "/reading"
"""Where a worker tells the first one what it has counted: a path of that socket alone."""
TRAFFIC_PATH = "/traffic"
"""Where it tells which requests it has seen since a time."""

log = logging.getLogger(__name__)

ANSWER_S = 2.0
"""How long another worker may take to answer: one that hangs is left out."""
STREAM_AGAIN_S = 0.5
"""Pause before the stream of a worker that has ended is opened again."""


class Others:
    """Asks the other workers, over the Unix sockets of their admin interfaces.

    ``name`` is this worker, ``paths`` are the others' sockets by name, and ``counts`` is the path of the file
    by which the next first worker learns what those before have told.
    """

    def __init__(self, name: str, paths: Mapping[str, str], counts: str) -> None:
        self.name = name
        self._counts = counts
        self._sessions = {
            worker: aiohttp.ClientSession(connector=aiohttp.UnixConnector(path))
            for worker, path in paths.items()
        }
        self._metrics = SummedMetrics(_read_counts(counts))
        self._written_one_at_a_time = asyncio.Lock()

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()

    async def ask(
        self, method: str, path: str, body: bytes = b"", kind: str = ""
    ) -> dict[str, tuple[int, bytes]]:
        """Return the status and the body of each other's answer, by name; without those that give none."""
        headers = {"content-type": kind} if body else {}

        async def one(session: aiohttp.ClientSession) -> tuple[int, bytes] | None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with (
                    asyncio.timeout(ANSWER_S),
                    session.request(method, f"http://localhost{path}", data=body, headers=headers) as answer,
                ):
                    return answer.status, await answer.read()
            return None

        answers = await asyncio.gather(*map(one, self._sessions.values()))
        return {name: each for name, each in zip(self._sessions, answers, strict=True) if each is not None}

    async def pass_on(self, request: web.Request) -> None:
        """Have the others do what we were asked for. One that cannot says so in the log."""
        body, kind = await request.read(), request.content_type
        answers = await self.ask(request.method, request.path_qs, body, kind)
        for worker in self._sessions:
            status, answer = answers.get(worker, (0, b"it gives no answer"))
            if not 200 <= status < 300:
                why = answer.decode(errors="replace")
                log.error("%s %s has failed at worker %s: %s", request.method, request.path, worker, why)

    async def get(self, path: str) -> list[bytes]:
        """Return what each other answers to a ``GET``, without those that have no answer."""
        return [body for status, body in (await self.ask("GET", path)).values() if status == 200]

    async def metrics(self, own: bytes) -> bytes:
        """Return the metrics of all, with our own page."""
        answers = await self.ask("GET", "/metrics")
        pages = {worker: body for worker, (status, body) in answers.items() if status == 200}
        page = await as_one_page(self._metrics.page(self.name, {self.name: own, **pages}))
        async with self._written_one_at_a_time:  # two may ask at once, and the newest is to stay
            data = msgspec.msgpack.encode(self._metrics.counted)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(_write_counts, self._counts, data)
        return page

    async def readings(self) -> dict[str, Reading]:
        """Return what each other has counted, by name."""
        answers = await self.ask("GET", READING_PATH)
        return {
            worker: msgspec.msgpack.decode(body, type=Reading)
            for worker, (status, body) in answers.items()
            if status == 200
        }

    async def traffic(self, since: float) -> list[Seen]:
        """Return what each other has seen since a time of the machine's monotonic clock."""
        return [
            msgspec.msgpack.decode(body, type=Seen)
            for body in await self.get(f"{TRAFFIC_PATH}?since={since!r}")
        ]

    async def follow(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Yield the server-sent events of all others as they come, also of those that are started again."""
        events: asyncio.Queue[bytes] = asyncio.Queue(maxsize=100)

        async def one(session: aiohttp.ClientSession) -> None:
            last = dict(headers)
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                    await _pour(session, path, last, events)
                await asyncio.sleep(STREAM_AGAIN_S)

        tasks = [asyncio.ensure_future(one(session)) for session in self._sessions.values()]
        try:
            while True:
                yield await events.get()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _pour(
    session: aiohttp.ClientSession, path: str, headers: dict[str, str], events: asyncio.Queue[bytes]
) -> None:
    """Put each event of a stream into a queue; note the number of the last in the headers, to go on there."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with session.get(f"http://localhost{path}", headers=headers, timeout=timeout) as answer:
        if answer.status != 200:
            return
        left = b""
        async for data in answer.content.iter_any():
            whole, end, left = (left + data).rpartition(b"\n\n")
            for event in whole.split(b"\n\n") if end else ():
                if event.startswith(b":"):
                    continue
                if event.startswith(b"id: "):
                    headers["last-event-id"] = event[4:].partition(b"\n")[0].decode()
                await events.put(event + b"\n\n")


def _read_counts(path: str) -> Counted | None:
    try:
        return msgspec.msgpack.decode(Path(path).read_bytes(), type=Counted)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("what the workers before have counted cannot be read: %s", error)
        return None


def _write_counts(path: str, data: bytes) -> None:
    Path(f"{path}.new").write_bytes(data)
    os.replace(f"{path}.new", path)
