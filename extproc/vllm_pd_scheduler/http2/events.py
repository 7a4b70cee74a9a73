"""What :class:`~.connection.Connection` tells of what its peer has sent."""

from __future__ import annotations

from dataclasses import dataclass

from .frames import ErrorCode
from .header_block import RequestHead


@dataclass(slots=True)
class RequestReceived:
    """A stream was opened. ``ended``: nothing more comes on it."""

    stream_id: int
    head: RequestHead
    ended: bool


@dataclass(slots=True)
class DataReceived:
    """Part of a request's content. It counts as unread until it is given to ``Connection.consumed``."""

    stream_id: int
    data: bytes
    ended: bool


@dataclass(slots=True)
class StreamEnded:
    """Nothing more comes on the stream: it ended with trailers, which mean nothing in gRPC."""

    stream_id: int


@dataclass(slots=True)
class StreamReset:
    """The stream is over: the peer has left it, or (``by_peer`` is false) has broken the protocol on it."""

    stream_id: int
    code: int
    by_peer: bool


@dataclass(slots=True)
class DataWritten:
    """What a stream had to send, and the windows had held back, is among the bytes to send."""

    stream_id: int


@dataclass(slots=True)
class PingAnswered:
    """The peer has answered our ping."""


@dataclass(slots=True)
class ConnectionEnded:
    """The peer has broken the protocol or a limit: what is left to send tells it so, and nothing follows."""

    code: ErrorCode
    reason: str


Event = (
    RequestReceived | DataReceived | StreamEnded | StreamReset | DataWritten | PingAnswered | ConnectionEnded
)
