"""What the workers of a machine and their parent send each other: frames over a Unix socket.

A frame is its length in four bytes and a MessagePack array whose first element says what it is.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any, cast

import msgspec
from msgspec import Struct

MAX_FRAME_BYTES = 2 << 20
"""A longer one is none of ours: its connection is closed."""

MAX_WAITING_BYTES = 4 << 20
"""What may wait for one who does not read. With more, what is next is dropped, or the connection closed."""


class Ready(Struct, tag=0, array_like=True, frozen=True):
    """A worker serves."""

    worker: str


class Told(Struct, tag=1, array_like=True, frozen=True):
    """A message for all other workers."""

    data: bytes


class Append(Struct, tag=2, array_like=True, frozen=True):
    """A change for the log, if its newest is still at a position."""

    call: int
    expected: str
    data: bytes


class Appended(Struct, tag=3, array_like=True, frozen=True):
    """What came of that: the change's position, or that the log has a newer one."""

    call: int
    position: str | None


class Newest(Struct, tag=4, array_like=True, frozen=True):
    """The newest change of the log; when a connection is made, also that there is none."""

    position: str
    data: bytes


class Alive(Struct, tag=5, array_like=True, frozen=True):
    """A worker's event loop runs."""

    worker: str


class Drained(Struct, tag=6, array_like=True, frozen=True):
    """A worker that drains has no request; its connection is closed when it may leave."""

    worker: str


Frame = Ready | Told | Append | Appended | Newest | Alive | Drained

_LENGTH = struct.Struct("!I")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """Return a frame as it is sent."""
    data = _encoder.encode(frame)
    return _LENGTH.pack(len(data)) + data


class FrameReader:
    """Makes frames of bytes as they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are whole by now; raise :exc:`ValueError` if this is none of ours."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes: at most {MAX_FRAME_BYTES} are read")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                frame: Any = _decoder.decode(body)
            except RecursionError:
                raise ValueError("a frame that is nested too deep") from None
            yield frame


class Connection(asyncio.Protocol):
    """One end of a connection that carries frames."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self._reader = FrameReader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.Protocol`."""
        self.transport = cast("asyncio.WriteTransport", transport)  # uvloop's is of no such class

    def connection_lost(self, error: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self.transport = None

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        try:
            for frame in self._reader.feed(data):
                self.received(frame)
        except ValueError as error:  # msgspec's are too
            self.close(str(error))

    def received(self, frame: Frame) -> None:
        """Take a frame of the other end."""
        raise NotImplementedError

    def close(self, why: str) -> None:
        """Close the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    def write(self, data: bytes) -> bool:
        """Send an encoded frame, unless the connection is closed or too much waits there; never wait."""
        if self.transport is None or self.transport.is_closing():
            return False
        if self.transport.get_write_buffer_size() > MAX_WAITING_BYTES:
            return False
        self.transport.write(data)
        return True
