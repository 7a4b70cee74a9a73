"""The connections on which Envoy sends streams that shall go on: HTTP/1.1, answers in pieces as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, and values."""

MAX_HEAD_BYTES = 1 << 17
MAX_BODY_BYTES = 64 << 20
"""As Envoy's filter ``buffer`` has it."""

HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}
    | {b"expect", b"host"}
)
"""Headers of one connection, which are not passed on."""

_NO_BODY = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its whole body."""

    method: bytes
    target: bytes
    """Path and query, as they came."""
    headers: Headers
    body: bytes

    @property
    def path(self) -> str:
        """The path, without the query."""
        return self.target.partition(b"?")[0].decode("latin-1")

    def header(self, name: str) -> str:
        """Return the value of a header, the empty string if there is none."""
        wanted = name.encode("ascii")
        return next((value.decode("latin-1") for each, value in self.headers if each == wanted), "")


class Source(Protocol):
    """Where an answer comes from."""

    def pause(self) -> None:
        """Send nothing for now: the client is slower."""
        ...

    def resume(self) -> None:
        """Go on."""
        ...


class Connection(asyncio.Protocol):
    """A connection of Envoy's. Its requests follow each other: ``serve`` answers each on it.

    When the client leaves, Envoy ends the connection, and ``serve`` is cancelled.
    """

    def __init__(
        self, serve: Callable[[Request, Connection], Awaitable[None]], every: set[Connection]
    ) -> None:
        self._source: Source | None = None
        self._full = False
        """Whether the client is slower."""
        self._serve = serve
        self._every = every
        self._transport: asyncio.Transport
        self._parser: HttpRequestParser | None = HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self._chunked = False
        self._forget()

    def take_from(self, source: Source) -> None:
        """Have an answer come from a source from now on, as fast as the client takes it."""
        self._source = source
        if self._full:
            source.pause()

    def begin(
        self, status: int, reason: bytes, headers: Iterable[tuple[bytes, bytes]], length: int | None
    ) -> None:
        """Send the head of an answer, with a body of this length, or in pieces."""
        self._chunked = length is None and status not in _NO_BODY
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, reason)]
        lines += [b"%b: %b\r\n" % header for header in headers if header[0] not in HOP_BY_HOP]
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        self._transport.write(b"".join(lines) + b"\r\n")

    def write(self, data: bytes) -> None:
        """Send a piece of the body, of one byte at least."""
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """End the answer: it is whole."""
        if self._chunked and not self._transport.is_closing():
            self._transport.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Break off the connection: Envoy then cuts the client's stream, or answers 503 if none has begun."""
        self._transport.abort()

    async def close(self) -> None:
        """Break off the connection, and wait until nothing is done for it any more."""
        task = self._task
        self.cut()
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, like the five below."""
        self._transport = cast(asyncio.Transport, transport)
        self._every.add(self)

    def data_received(self, data: bytes) -> None:
        """Read on. What is no request ends the connection, and so does one before the last is answered."""
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take it that the client has left, or Envoy."""
        self._every.discard(self)
        self._parser = None  # which refers to this
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """Have no more come than the client takes."""
        self._full = True
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        """Have more come."""
        self._full = False
        if self._source is not None:
            self._source.resume()

    def on_message_begin(self) -> None:
        """Called by the parser, like all below."""
        if self._task is not None:
            raise ValueError("a request before the answer to the one before")

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._target += url
        self._count_head(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._count_head(name + value)
        self._headers.append((name.lower(), value))

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._body_bytes += len(data)
        if self._body_bytes > MAX_BODY_BYTES:
            raise ValueError("a body that Envoy would not send")
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Have the request answered."""
        assert self._parser is not None
        method = self._parser.get_method()
        request = Request(method, self._target, self._headers, b"".join(self._body))
        keep = self._parser.should_keep_alive()
        self._forget()
        self._task = asyncio.get_running_loop().create_task(self._answer(request, keep))

    def _count_head(self, part: bytes) -> None:
        self._head_left -= len(part)
        if self._head_left < 0:
            raise ValueError("a head that Envoy would not send")

    def _forget(self) -> None:
        self._target, self._headers, self._body = b"", Headers(), list[bytes]()
        self._head_left, self._body_bytes = MAX_HEAD_BYTES, 0

    async def _answer(self, request: Request, keep: bool) -> None:
        served = False
        try:
            await self._serve(request, self)
            served = True
        finally:
            self._task = self._source = None
            if not served:
                self.cut()
            elif not keep:
                self._transport.close()
