"""What :class:`~.connection.Connection` tells of what its peer has sent."""

from __future__ import annotations

from msgspec import Struct

from .frames import ErrorCode
from .header_block import RequestHead


class RequestReceived(Struct, gc=False):
    """A stream was opened. ``ended``: nothing more comes on it."""

    stream_id: int
    head: RequestHead
    ended: bool


class DataReceived(Struct, gc=False):
    """Part of a request's content. It counts as unread until it is given to ``Connection.consumed``."""

    stream_id: int
    data: bytes
    ended: bool


class StreamEnded(Struct, gc=False):
    """Nothing more comes on the stream: it ended with trailers, which mean nothing in gRPC."""

    stream_id: int


class StreamReset(Struct, gc=False):
    """The stream is over: the peer has left it, or (``by_peer`` is false) has broken the protocol on it."""

    stream_id: int
    code: int
    by_peer: bool


class DataWritten(Struct, gc=False):
    """What a stream had to send, and the windows had held back, is among the bytes to send."""

    stream_id: int


class PingAnswered(Struct, gc=False):
    """The peer has answered our ping."""


class ConnectionEnded(Struct, gc=False):
    """The peer has broken the protocol or a limit: what is left to send tells it so, and nothing follows."""

    code: ErrorCode
    reason: str


Event = (
    RequestReceived | DataReceived | StreamEnded | StreamReset | DataWritten | PingAnswered | ConnectionEnded
)
