"""An answer of Envoy's ingress, piece by piece as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Self, cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from ..instance_http.errors import AnswerRefused, ConnectionLost, NotConnected, NotHttp, RequestFailed
from ..system.keepalive import keep_alive
from .envoy_side import HOP_BY_HOP, Headers

CONNECT_S = 5.0
_READ_BYTES = 1 << 16
_HEAD_BYTES = 1 << 17


class Ingress:
    """Asks Envoy's ingress, ``http://HOST:PORT``: each request has a connection of its own."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._authority = parts.netloc.encode("ascii")
        self._buffer = memoryview(bytearray(_READ_BYTES))

    async def ask(
        self, method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> Answer:
        """Send a request; return its answer when its head has come. ``async with`` it: that ends it.

        Raise :exc:`~vllm_pd_scheduler.instance_http.errors.RequestFailed`.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, answer = await loop.create_connection(lambda: Answer(self._buffer), self._host, self._port)
        except OSError as error:
            raise NotConnected(str(error), error) from None
        lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, target, self._authority)]
        lines += [b"%b: %b\r\n" % header for header in headers if header[0] not in HOP_BY_HOP]
        lines.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
        try:
            await answer.come(b"".join(lines) + body)
        except BaseException:
            answer.close()
            raise
        return answer


class Answer(asyncio.BufferedProtocol):
    """One answer on a connection of its own. Its body is not read before it is wanted.

    What has come together is taken as one. All read into one ``buffer``: to have one made for each read, as
    asyncio does else, takes longer than all else that is done for an event.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self.status = 0
        self.reason = b""
        self.headers: Headers = []
        self._transport: asyncio.Transport
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._take: Callable[[bytes], object] | None = None
        self._parts: list[bytes] = []
        self._whole = self._paused = False
        self._head_left = _HEAD_BYTES

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def header(self, name: str) -> str:
        """Return the value of a header, the empty string if there is none."""
        wanted = name.encode("ascii")
        return next((value.decode("latin-1") for each, value in self.headers if each == wanted), "")

    async def come(self, request: bytes) -> None:
        """Send a request, and wait for the head of the answer. Raise :exc:`RequestFailed`."""
        self._transport.write(request)
        await self._begun

    async def pass_to(self, take: Callable[[bytes], object]) -> None:
        """Have the body taken as it comes, until it is whole. Raise :exc:`RequestFailed` if it breaks off.

        It also ends when ``take`` raises :exc:`ValueError`.
        """
        self._take = take
        self._pass_parts()
        if not (self._whole or self._paused):
            self.resume()
        await self._ended

    async def read(self, limit: int) -> bytes:
        """Return the whole body. Raise :exc:`RequestFailed` if it breaks off, or is longer."""
        parts = []

        def take(data: bytes) -> None:
            parts.append(data)
            if sum(map(len, parts)) > limit:
                raise ValueError(f"more than {limit} bytes")

        await self.pass_to(take)
        return b"".join(parts)

    def close(self) -> None:
        """Want no more of it. What has not come whole is ended."""
        self._fail(ConnectionLost("it was given up"))

    def pause(self) -> None:
        """Read nothing for now."""
        self._paused = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self._paused = False
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, like the three below."""
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(transport.get_extra_info("socket"))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Have what comes next read into this."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Read what has come."""
        if self._parser is None:
            return
        try:
            self._parser.feed_data(self._buffer[:nbytes])
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self._whole:
                self._fail(NotHttp(f"its answer is not HTTP/1.1: {error}"))
                return
        self._pass_parts()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take it that nothing more comes."""
        self._fail(ConnectionLost("the connection ended in the answer", exc))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, like all below."""
        self._head_left -= len(name) + len(value)
        if self._head_left < 0:
            raise ValueError("too many headers")
        if not self.status:
            self.headers.append((name.lower(), value))

    def on_status(self, status: bytes) -> None:
        """Take the words beside the status."""
        self.reason = status

    def on_headers_complete(self) -> None:
        """Take it that the head has come."""
        assert self._parser is not None
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self.headers.clear()
            return
        self.status = status
        self._transport.pause_reading()
        if not self._begun.done():
            self._begun.set_result(None)

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._parts.append(data)

    def on_message_complete(self) -> None:
        """Take it that the answer is whole, unless it is an interim one."""
        self._whole = bool(self.status)

    def _pass_parts(self) -> None:
        """Have taken what has come, and say so if that was all."""
        take = self._take
        if take is None:
            return
        if parts := self._parts:
            self._parts = []
            try:
                take(parts[0] if len(parts) == 1 else b"".join(parts))
            except ValueError as error:
                self._fail(AnswerRefused(str(error)))
                return
        if self._whole and not self._ended.done():
            self._ended.set_result(None)
            self._end()

    def _fail(self, error: RequestFailed) -> None:
        for each in (self._begun, self._ended):
            if not each.done():
                each.set_exception(error)
                each.exception()  # whether somebody waits or not
        self._end()

    def _end(self) -> None:
        self._parser = None  # which refers to this
        self._transport.abort()
