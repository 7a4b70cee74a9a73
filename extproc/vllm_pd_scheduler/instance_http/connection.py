"""One HTTP/1.1 connection to an instance: one request at a time, and its answer read up to a limit."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from typing import Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from ..system.keepalive import keep_alive
from ..system.unacknowledged import unacknowledged
from .errors import AnswerRefused, ConnectionLost, NotConnected, NotHttp, RequestFailed
from .exchange import Answer, Destination, Exchange

IDLE_S = 4.0
"""How long a connection may be idle. uvicorn, and so vLLM (``VLLM_HTTP_TIMEOUT_KEEP_ALIVE``), closes one that
has been so for 5 s, and a request must not meet that. Envoy's clusters have the same."""
_IDLE_SHARE = IDLE_S / 5.0
"""Of what the instance itself says in ``Keep-Alive: timeout=N``."""
_IDLE_AT_MOST_S = 60.0
_SAID_IDLE = re.compile(rb"(?:^|[,\s])timeout=([0-9]{1,9})(?:$|[,\s])")

MAX_HEAD_BYTES = 1 << 16
"""Of all headers of an answer with interim answers and trailers, and of what comes between two parts of its
body. vLLM's own have some 200."""
_HEADER_OVERHEAD = 32
"""Bytes that a header counts beyond its own: so there are at most 2,048."""
_COPIED_BYTES = 1 << 16
"""Up to so many a body is copied behind its head, so that both are one write."""


class Owner(Protocol):
    """Whoever has the connection."""

    def free(self, connection: Connection) -> None:
        """Take back a connection that can be used again."""
        ...

    def gone(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        ...

    def repeat(self, exchange: Exchange) -> None:
        """Send a request once more, on a new connection: nothing of it has arrived."""
        ...


class Connection(asyncio.Protocol):
    """A connection on which requests follow each other.

    ``start`` sends one; its exchange gets the answer or the error. Then the connection is its owner's again,
    or it ends. Whatever is not clear ends it: bytes that nobody asked for, an answer before the request had
    gone out whole, one that is not HTTP.
    """

    def __init__(self, owner: Owner, to: Destination) -> None:
        self.to = to
        self.idle_until = 0.0
        """By ``time.monotonic``: the loop's own time stands still while the loop does."""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended."""
        self._owner = owner
        self._transport: asyncio.Transport
        self._closing = False
        self._used = False
        self._exchange: Exchange | None = None
        self._clear()

    def usable(self, now: float) -> bool:
        """Whether an idle connection can take a request: the instance has not closed it, nor will just now."""
        return now < self.idle_until and not self._closing and not self._transport.is_closing()

    def start(self, exchange: Exchange) -> None:
        """Send a request. There must be none whose answer is still to come."""
        assert self._exchange is None
        if self._closing or self._transport.is_closing():
            exchange.fail(NotConnected("it closed the connection at once"))
            return
        self._exchange = exchange
        exchange.stop = self.abort
        # A new one for each answer takes 0.3 µs; so nothing of an answer can become part of the next one.
        self._parser = HttpResponseParser(self)
        self._left = exchange.limit
        self._head_left = MAX_HEAD_BYTES
        if len(exchange.body) <= _COPIED_BYTES:
            self._transport.write(exchange.head + exchange.body)
        else:
            self._transport.writelines((exchange.head, exchange.body))

    def abort(self) -> None:
        """End the connection now, with its request if it has one. vLLM then aborts that."""
        self._closing = True
        self._exchange = None
        self._clear()
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._exchange is None or self._parser is None:
            self.abort()  # nobody has asked for anything
            return
        self._since_body += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if self._complete:
                self._reusable = False  # something came after the answer
            else:
                self._problem = self._problem or NotHttp(f"its answer is not HTTP/1.1: {error}")
        if self._problem is not None:
            self._fail(self._problem)
        elif self._complete:
            self._finish()
        elif self._since_body > MAX_HEAD_BYTES:
            self._fail(_too_many_headers())

    def eof_received(self) -> None:
        """Called by the event loop: the instance sends nothing more."""
        self._closing = True
        exchange = self._exchange
        if exchange is None:
            return
        if self._ends_with_connection:
            self._finish()
        elif self._never_arrived(exchange):
            self.abort()
            self._owner.repeat(exchange)
        else:
            words = "in its answer" if self._status or self._since_body else "without an answer"
            self._fail(ConnectionLost(f"it closed the connection {words}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._closing = True
        if self._exchange is not None:
            unread = not self._used and not self._status and not self._since_body
            if isinstance(exc, ssl.SSLError) and unread:  # TLS 1.3 refuses a client's certificate as late as that
                self._fail(NotConnected(f"TLS: {exc}", exc))
            else:
                self._fail(ConnectionLost(f"the connection broke: {exc or 'it was closed here'}", exc))
        self._owner.gone(self)
        self.lost.set_result(None)

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._complete:
            raise ValueError("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, for trailers too."""
        self._head_left -= len(name) + len(value) + _HEADER_OVERHEAD
        if self._head_left < 0:
            self._problem = self._problem or _too_many_headers()
        elif not self._status:
            self._headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        assert self._parser is not None
        assert self._exchange is not None
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._interim = True
            self._headers.clear()
            if status == 101:
                self._problem = self._problem or NotHttp("it changes to another protocol")
            return
        self._status = status
        encoding = self._headers.get(b"content-encoding", b"").strip().lower()
        length = self._headers.get(b"content-length")
        coding = self._headers.get(b"transfer-encoding")
        if encoding not in (b"", b"identity"):
            self._problem = self._problem or AnswerRefused(
                f"its encoding is {encoding[:40]!r}, where none was asked for"
            )
        elif coding is not None and coding.lower() != b"chunked":
            self._problem = self._problem or NotHttp(f"its transfer-encoding is {coding[:40]!r}")
        elif length is not None and int(length) > self._exchange.limit:
            self._problem = self._problem or _too_large(self._exchange.limit)
        self._ends_with_connection = length is None and coding is None

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        self._since_body = 0
        self._left -= len(data)
        if self._left >= 0:
            self._chunks.append(data)
        elif self._exchange is not None:
            self._problem = self._problem or _too_large(self._exchange.limit)

    def on_message_complete(self) -> None:
        """Called by the parser, after each interim answer too."""
        assert self._parser is not None
        if self._interim:
            self._interim = False
        else:
            self._complete = True
            self._reusable = self._parser.should_keep_alive()

    def _clear(self) -> None:
        """Forget the answer that was read."""
        self._parser: HttpResponseParser | None = None
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []
        self._status = 0
        self._since_body = 0
        self._left = self._head_left = 0
        self._interim = self._complete = self._reusable = self._ends_with_connection = False
        self._problem: RequestFailed | None = None

    def _finish(self) -> None:
        """Give the answer to who waits for it. The connection is free before that."""
        exchange, chunks = self._exchange, self._chunks
        assert exchange is not None
        try:
            answer = Answer(self._status, self._headers, chunks[0] if len(chunks) == 1 else b"".join(chunks))
        except MemoryError as error:
            self._fail(ConnectionLost("no memory for its answer", error))
            return
        # An answer to what has not gone out whole is the last one here.
        reusable = self._reusable and not self._closing and not self._transport.get_write_buffer_size()
        self._exchange = None
        self._used = True
        self._clear()
        if reusable:
            self.idle_until = time.monotonic() + _idle_time(answer)
            self._owner.free(self)
        else:
            self.abort()
        exchange.succeed(answer)

    def _fail(self, error: RequestFailed) -> None:
        exchange = self._exchange
        self.abort()
        if exchange is not None:
            exchange.fail(error)

    def _never_arrived(self, exchange: Exchange) -> bool:
        """Whether a request met a connection that the instance had closed, and may be sent once more.

        An instance that ends while it works on a request closes the connection too, and then the request must
        not be sent again by us: its prompt may be why. Only what the peer's machine has confirmed can have
        been read there, and the end of a connection (a FIN) confirms all that came before it. So a request of
        which no byte is confirmed when the end comes was never read. A reset (RST) confirms nothing: after
        one, or after a single byte of an answer, or on a new connection, the request counts as delivered.
        """
        if not self._used or self._status or self._since_body or exchange.repeated:
            return False
        socket = self._transport.get_extra_info("socket")
        return unacknowledged(socket.fileno()) >= len(exchange.head) + len(exchange.body)


def _idle_time(answer: Answer) -> float:
    """Return for how many seconds the connection may be idle after an answer."""
    said = _SAID_IDLE.search(answer.headers.get(b"keep-alive", b"").lower())
    return IDLE_S if said is None else min(_IDLE_AT_MOST_S, _IDLE_SHARE * int(said[1]))


def _too_large(limit: int) -> AnswerRefused:
    return AnswerRefused(f"it has more than {limit} bytes")


def _too_many_headers() -> NotHttp:
    return NotHttp(f"its headers have more than {MAX_HEAD_BYTES} bytes")
