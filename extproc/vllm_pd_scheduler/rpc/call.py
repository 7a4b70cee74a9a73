"""One call: its messages go to a receiver as they come, and the receiver's answers to the client."""

from __future__ import annotations

import logging
import re
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..http2 import Connection
from ..http2.header_block import RequestHead
from .messages import MessageReader, TooLarge, prefix
from .status import HEADERS, CallError, StatusCode, trailers

log = logging.getLogger(__name__)

LARGE_BYTES = 64 << 10
"""Whether there is room for a larger message its receiver is asked before it comes."""

UNCOUNTED_BYTES = 1 << 20
"""Of a larger message the receiver keeps account itself."""

MAX_UNFINISHED_BYTES = 256 << 20
"""Memory for the messages of one connection that have begun and not ended, beside the largest."""

_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


Bytes = bytes | memoryview


class Receiver(Protocol):
    """What serves one call. All methods are called in the event loop and must not block it."""

    def accepts(self, size: int) -> bool:
        """Whether there is room for a large message of so many bytes, which has not come.

        It is also asked of one that is over the limit, whatever it returns then. A receiver that ends the
        call itself need not care what it returns.
        """
        ...

    def message(self, data: bytes | bytearray) -> None:
        """Take the message that :meth:`Call.next` has asked for."""
        ...

    def half_closed(self) -> None:
        """Learn that :meth:`Call.next` has asked for a message, and that none comes any more."""
        ...

    def written(self) -> None:
        """Learn that what was written last has gone to the client."""
        ...

    def cancelled(self) -> None:
        """Learn that the call is over, before :meth:`Call.finish`: the client has left, say."""
        ...


@dataclass(frozen=True, slots=True)
class Method:
    """How calls of one path are served. ``max_bytes`` is the size of the largest message."""

    open: Callable[[Call], Receiver]
    max_bytes: int


class Host(Protocol):
    """What a call needs of its connection."""

    connection: Connection
    loop: AbstractEventLoop
    unfinished: int
    """Bytes of the connection's messages that have begun and not ended."""

    @property
    def is_open(self) -> bool:
        """Whether something that is written now goes out."""
        ...

    def flush(self) -> None:
        """Send what there is, if nobody does at once."""
        ...

    def complain(self, call: Call, error: CallError) -> None:
        """Learn that a client sends what a call cannot have."""
        ...

    def forget(self, call: Call) -> None:
        """A call is over."""
        ...


class Call:
    """A call that a client has opened. No message is read before :meth:`next` asks for it."""

    __slots__ = (
        "_asked",
        "_begun",
        "_delivering",
        "_host",
        "_peer_ended",
        "_reader",
        "_receiver",
        "_timer",
        "_unfinished",
        "head",
        "is_over",
        "stream_id",
    )

    def __init__(self, host: Host, stream_id: int, head: RequestHead, method: Method, ended: bool) -> None:
        self.stream_id = stream_id
        self.head = head
        self.is_over = False
        self._host = host
        self._begun = False
        self._asked = False
        self._delivering = True
        self._unfinished = 0
        self._peer_ended = ended
        timeout = head.fields.get(b"grpc-timeout")
        self._timer: TimerHandle | None = self._limit(timeout) if timeout else None
        self._receiver = method.open(self)
        self._reader = MessageReader(method.max_bytes)
        self._delivering = False

    def _limit(self, timeout: bytes) -> TimerHandle | None:
        read = _TIMEOUT.fullmatch(timeout)
        if read is None:
            return None
        seconds = int(read[1]) * _UNITS_S[read[2]]
        return self._host.loop.call_later(
            seconds, self._refuse, CallError(StatusCode.DEADLINE_EXCEEDED, "the call took too long")
        )

    # -- for the receiver

    @property
    def connection(self) -> object:
        """What all calls of one connection have in common."""
        return self._host

    @property
    def is_connected(self) -> bool:
        """Whether the client can still be reached; if not, it may not know that the call is over."""
        return self._host.is_open

    def metadata(self, name: str) -> str | None:
        """Return a field of the call's head, the last one of that name."""
        value = self.head.fields.get(name.encode())
        return None if value is None else value.decode("utf-8", "replace")

    def next(self) -> None:
        """Ask for the next message. It can come before this returns."""
        self._asked = True
        self._deliver()

    def write(self, *parts: Bytes) -> None:
        """Send a message. The receiver's ``written`` is called when it is out, perhaps before this returns.

        The parts must not change until then, nor may another message be written.
        """
        self._write((prefix(sum(map(len, parts))), *parts))

    def write_all(self, messages: Iterable[Sequence[Bytes]]) -> None:
        """Send several messages, each in parts, as :meth:`write` does one: ``written`` is called once."""
        self._write([part for parts in messages for part in (prefix(sum(map(len, parts))), *parts)])

    def _write(self, parts: Sequence[Bytes]) -> None:
        if self.is_over or not self._host.is_open:
            return
        connection = self._host.connection
        if not self._begun:
            self._begun = True
            connection.send_headers(self.stream_id, HEADERS)
        out = connection.send_content(self.stream_id, parts)
        self._host.flush()
        if out:
            self._receiver.written()

    def finish(self, code: StatusCode = StatusCode.OK, message: str = "") -> None:
        """End the call, after what was written. Further calls do nothing."""
        if self.is_over:
            return
        self._host.connection.end_stream(self.stream_id, trailers(code, message, alone=not self._begun))
        self._close()
        self._host.flush()

    # -- for the connection

    def start(self) -> None:
        """Begin to serve the call: what came with its head comes next."""
        self._deliver()

    def feed(self, data: bytes, ended: bool) -> None:
        """Take content."""
        if data:
            self._reader.feed(data)
        self._peer_ended = ended
        self._deliver()

    def content_written(self) -> None:
        """Tell the receiver that a message is out that could not go at once."""
        if not self.is_over:
            self._receiver.written()

    def cancel(self) -> None:
        """The client has left, or the connection is lost."""
        if not self.is_over:
            receiver = self._receiver
            self._close()
            receiver.cancelled()

    def _expect(self, size: int) -> None:
        """Make room for a message that comes in parts; raises :exc:`CallError` if there is none."""
        room = size <= LARGE_BYTES or self._receiver.accepts(size)
        if size <= UNCOUNTED_BYTES and not self.is_over:
            self._host.unfinished += size
            self._unfinished = size
        if not room or self._host.unfinished > MAX_UNFINISHED_BYTES:
            raise CallError(StatusCode.RESOURCE_EXHAUSTED, f"no room for a message of {size} bytes")

    def _forget_message(self) -> None:
        self._host.unfinished -= self._unfinished
        self._unfinished = 0

    def _close(self) -> None:
        self.is_over = True
        del self._receiver  # which knows this call: the two would be left to the garbage collector
        self._forget_message()
        if self._timer is not None:
            self._timer.cancel()
        self._host.forget(self)

    def _refuse(self, error: CallError) -> None:
        """End the call in the receiver's place."""
        if not self.is_over:
            receiver = self._receiver
            self.finish(error.code, str(error))
            receiver.cancelled()

    def _deliver(self) -> None:
        """Give the receiver what it has asked for: it may ask for more meanwhile."""
        if self._delivering or self.is_over:
            return
        self._delivering = True
        reader = self._reader
        try:
            while self._asked and not self.is_over:
                message = reader.take()
                if message is not None:
                    self._asked = False
                    if self._unfinished:
                        self._forget_message()
                    self._receiver.message(message)
                    continue
                if reader.begun:
                    begun, reader.begun = reader.begun, 0
                    self._expect(begun)
                if self._peer_ended:
                    if not reader.is_empty:
                        raise CallError(StatusCode.INTERNAL, "the last message is not whole")
                    self._asked = False
                    self._receiver.half_closed()
                break
        except CallError as error:
            if isinstance(error, TooLarge):
                self._receiver.accepts(error.size)  # it may answer itself
            if not self.is_over:
                self._host.complain(self, error)
                self._refuse(error)
        except Exception:
            log.exception("a call could not be served")
            self._refuse(CallError(StatusCode.INTERNAL, "the scheduler has failed"))
        finally:
            self._delivering = False
        if self.is_over:
            return
        if reader.missing:
            self._host.connection.expect(self.stream_id, reader.missing)
        if reader.consumed:
            self._host.connection.consumed(self.stream_id, reader.consumed)
            reader.consumed = 0
        self._host.flush()
