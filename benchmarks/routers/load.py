"""A load client that costs little: raw HTTP/1.1 on connections that stay open, without a task a request.

It is a closed loop: each client sends its next request when the answer to its last one is complete. With a
rate it waits until that one is due.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any

from . import http1

PATIENCE_S = 30.0
"""Seconds that answers may take beyond the time in which requests are sent."""

_EVENT = b"data: "
_DONE = 1
"""Events of a stream that are not tokens: the last one."""

_numbers = itertools.count(1)
"""Of requests: no two of a process have the same, so that no router has seen a prompt before."""

Body = Callable[[int], Sequence[bytes]]
"""Gives the parts of the body of a request by its number."""


@dataclass
class Seen:
    """What the clients of a run have seen. Times are in seconds."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    """From each request to the end of its answer."""
    first_tokens: list[float] = field(default_factory=list)
    """From each request to the first token of its stream."""
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def p50(self) -> float:
        """Return the median time of an answer."""
        return median(self.times)

    @property
    def p99(self) -> float:
        """Return the time within which 99 % of the answers came."""
        return sorted(self.times)[int(len(self.times) * 0.99)]


class _Run:
    """A run's requests, and its end: when each client has the answer to its last one."""

    def __init__(self, body: Body, clients: int, until: float, stream: int, rate: float) -> None:
        self.body, self.until = body, until
        self.stream = stream
        self._due, self._apart = time.perf_counter(), 1.0 / rate if rate else 0.0
        self.seen = Seen()
        self.left = clients
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def next_body(self) -> Sequence[bytes]:
        return self.body(next(_numbers))

    def delay(self) -> float:
        """Return for how many seconds the next request waits for its turn."""
        if not self._apart:
            return 0.0
        self._due += self._apart
        return max(0.0, self._due - time.perf_counter())

    def client_done(self) -> None:
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


class _Client(asyncio.Protocol):
    """A client and its connection."""

    def __init__(self, port: int) -> None:
        self._path = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        self._transport: Any = None
        self._run: _Run | None = None
        """The run in which an answer is awaited."""
        self._reset()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def start(self, run: _Run) -> None:
        """Send requests, one after the other, until the run's time is over."""
        self._run = run
        self._send_next(run)

    def abandon(self) -> bool:
        """Close the connection if an answer is still awaited, and return whether it was."""
        waiting, self._run = self._run is not None, None
        if waiting:
            self._transport.abort()
        return waiting

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._fail("connection lost")

    def _send_next(self, run: _Run) -> None:
        if delay := run.delay():
            asyncio.get_running_loop().call_later(delay, self._send, run)
        else:
            self._send(run)

    def _send(self, run: _Run) -> None:
        parts = run.next_body()
        length = sum(map(len, parts))
        head = f"{self._path}content-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()
        self._reset()
        self._begin = time.perf_counter()
        self._transport.writelines([head, *parts])

    def _reset(self) -> None:
        self._head = b""
        self._has_head = False
        self._left = 0
        """Bytes of the body that have not come, or ``CHUNKED``."""
        self._tail = b""
        """The end of what has come: an event's mark and the last chunk may come in two pieces."""
        self._events = 0

    def data_received(self, data: bytes) -> None:
        run = self._run
        if run is None:
            return
        if not self._has_head:
            self._head += data
            head, end, data = self._head.partition(http1.HEAD_END)
            if not end:
                return
            self._has_head = True
            if head[9:12] != b"200":
                self._fail(f"status {head[9:12].decode()}")
                return
            self._left = http1.content_length(head)
        if self._left != http1.CHUNKED:
            self._left -= len(data)
            if self._left <= 0:
                self._answered(run)
            return
        data = self._tail + data
        if run.stream:
            events = data.count(_EVENT)
            if events and not self._events:
                run.seen.first_tokens.append(time.perf_counter() - self._begin)
            self._events += events
        if data.endswith(http1.LAST_CHUNK):
            self._answered(run)
        else:
            self._tail = data[-len(_EVENT) + 1 :]

    def _answered(self, run: _Run) -> None:
        now, seen = time.perf_counter(), run.seen
        if run.stream:
            tokens = self._events - _DONE
            seen.tokens += tokens
            if tokens != run.stream:
                self._fail("cut stream")
                return
        seen.times.append(now - self._begin)
        if now < run.until:
            self._send_next(run)
        else:
            self._run = None
            run.client_done()

    def _fail(self, why: str) -> None:
        """Count an error. The client sends no more in this run: one error makes it worthless."""
        run, self._run = self._run, None
        if run is not None:
            run.seen.errors[why] += 1
            self._transport.abort()
            run.client_done()


class Load:
    """So many clients of a server at a port of this machine, as an async context manager."""

    def __init__(self, port: int, clients: int) -> None:
        self._port = port
        self._clients = [_Client(port) for _ in range(clients)]

    async def __aenter__(self) -> Load:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()

    async def run(self, body: Body, seconds: float = 0.0, stream: int = 0, rate: float = 0.0) -> Seen:
        """Send requests for so many seconds; with 0, one a client. A ``stream`` must have so many tokens.

        ``rate`` is how many requests a second all clients send together, as far as answers come in time.
        """
        await self._open()
        begin = time.perf_counter()
        run = _Run(body, len(self._clients), begin + seconds, stream, rate)
        for client in self._clients:
            client.start(run)
        try:
            async with asyncio.timeout(seconds + PATIENCE_S):
                await run.done
        except TimeoutError:
            run.seen.errors["no answer"] += sum(client.abandon() for client in self._clients)
        run.seen.seconds = time.perf_counter() - begin
        return run.seen

    async def _open(self) -> None:
        """Connect the clients that have no connection, or none any more."""
        self._clients = [each if each.is_open else await self._connected() for each in self._clients]

    async def _connected(self) -> _Client:
        client = _Client(self._port)
        await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", self._port)
        return client
