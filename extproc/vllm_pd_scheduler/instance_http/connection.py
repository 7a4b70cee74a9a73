"""One HTTP/1.1 connection to an instance: one request at a time, and its answer."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Protocol, cast

from ..system.keepalive import keep_alive
from ..system.unacknowledged import unacknowledged, unread
from .answer_reader import AnswerReader
from .errors import ConnectionLost, NotConnected, RequestFailed
from .exchange import Answer, Destination, Exchange

_IDLE_SHARE = 0.8
"""Of what the server itself says in ``Keep-Alive: timeout=N``, a connection may be idle for so much."""
_IDLE_AT_MOST_S = 60.0
_SAID_IDLE = re.compile(rb"(?:^|[,\s])timeout=([0-9]{1,9})(?:$|[,\s])")

_NAMED_BYTES = 256
"""Where in its answer an instance repeats what a request is called: vLLM begins it with that."""

_COPIED_BYTES = 1 << 16
"""Up to so many a body is copied behind its head, so that both are one write."""


class Owner(Protocol):
    """Whoever has the connection."""

    @property
    def idle_s(self) -> float:
        """How long it may be idle, unless the server says that."""
        ...

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
    or it ends. Whatever is not clear ends it: bytes that nobody asked for, an answer that came before the
    request had gone out whole, or is that of the request before, one that is not HTTP.
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
        self._before = b""
        """What the request before was called."""
        self._exchange: Exchange | None = None
        self._reader: AnswerReader | None = None

    def usable(self, now: float) -> bool:
        """Whether an idle connection can take a request.

        It is open, will not be closed just now, and nothing has come that nobody asked for. That may not have
        been read yet, and would be taken for the answer.
        """
        if now >= self.idle_until or self._closing or self._transport.is_closing():
            return False
        return not unread(self._transport.get_extra_info("socket").fileno())

    def start(self, exchange: Exchange) -> None:
        """Send a request. There must be none whose answer is still to come."""
        assert self._exchange is None
        if self._closing or self._transport.is_closing():
            exchange.fail(NotConnected("the connection ended before the request was sent"))
            return
        self._exchange = exchange
        self._reader = AnswerReader(exchange.limit)
        exchange.stop = self.abort
        if len(exchange.body) <= _COPIED_BYTES:
            self._transport.write(exchange.head + exchange.body)
        else:
            self._transport.writelines((exchange.head, exchange.body))
        if exchange.sent is not None:
            exchange.sent()

    def abort(self) -> None:
        """End the connection now, with its request if it has one. vLLM then aborts that."""
        self._fail(ConnectionLost("it was given up"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, like all below."""
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        """Read on. What nobody has asked for ends the connection."""
        reader = self._reader
        if reader is None:
            self.abort()
            return
        try:
            reader.feed(data)
            if reader.complete:
                self._finish(reader)
        except RequestFailed as error:
            self._fail(error)
        except MemoryError as error:
            self._fail(ConnectionLost("no memory for its answer", error))

    def eof_received(self) -> None:
        """Take it that the instance sends nothing more."""
        self._closing = True
        exchange, reader = self._exchange, self._reader
        if exchange is None or reader is None:
            return
        if reader.ends_with_connection:
            self._finish(reader)
        elif self._never_arrived(exchange, reader):
            self._release()
            self.abort()
            self._owner.repeat(exchange)
        else:
            words = "in its answer" if reader.began else "without an answer"
            self._fail(ConnectionLost(f"it closed the connection {words}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Take it that the connection has ended."""
        self._closing = True
        if self._exchange is not None:
            self._fail(ConnectionLost(f"the connection ended: {exc or 'without an answer'}", exc))
        self._owner.gone(self)
        self.lost.set_result(None)

    def _release(self) -> Exchange | None:
        """Let go of the request, if there is one, and return it."""
        exchange, self._exchange = self._exchange, None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        return exchange

    def _finish(self, reader: AnswerReader) -> None:
        """Give the answer to who waits for it. The connection is free before that."""
        answer = reader.answer()
        exchange = self._release()
        assert exchange is not None
        if _is_of(self._before, exchange.name, answer.body[:_NAMED_BYTES]):
            self.abort()
            exchange.fail(ConnectionLost("it answered the request before twice"))
            return
        self._used = True
        self._before = exchange.name
        # An answer to what has not gone out whole is the last one here.
        if reader.reusable and not self._closing and not self._transport.get_write_buffer_size():
            self.idle_until = time.monotonic() + _idle_time(answer, self._owner.idle_s)
            self._owner.free(self)
        else:
            self.abort()
        exchange.succeed(answer)

    def _fail(self, error: RequestFailed) -> None:
        self._closing = True
        exchange = self._release()
        self._transport.abort()
        if exchange is not None:
            exchange.fail(error)

    def _never_arrived(self, exchange: Exchange, reader: AnswerReader) -> bool:
        """Whether a request met a connection that the instance had closed, and may be sent once more.

        An instance that ends while it works on a request closes the connection too, and then the request must
        not be sent again by us: its prompt may be why. Only what the peer's machine has confirmed can have
        been read there, and the end of a connection (a FIN) confirms all that came before it. So a request of
        which no byte is confirmed when the end comes was never read. A reset (RST) confirms nothing: after
        one, or after a single byte of an answer, or on a new connection, the request counts as delivered.
        """
        if not self._used or reader.began or exchange.repeated:
            return False
        socket = self._transport.get_extra_info("socket")
        return unacknowledged(socket.fileno()) >= len(exchange.head) + len(exchange.body)


def _is_of(before: bytes, name: bytes, answer: bytes) -> bool:
    """Whether an answer names the request before it and not its own.

    Where an instance does not repeat the names of requests, nothing can be told.
    """
    return bool(before) and before in answer and name not in answer


def _idle_time(answer: Answer, default: float) -> float:
    """Return for how many seconds the connection may be idle after an answer."""
    said = _SAID_IDLE.search(answer.headers.get(b"keep-alive", b"").lower())
    return default if said is None else min(_IDLE_AT_MOST_S, _IDLE_SHARE * int(said[1]))
