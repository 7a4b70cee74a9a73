"""Frames as bytes: their types, flags, settings and error codes, and how each that is sent is written."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client's connection begins with."""

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS = 1, 2, 3
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 4, 5, 6

FRAME_HEADER_BYTES = 9
DEFAULT_WINDOW_BYTES = 65_535
DEFAULT_MAX_FRAME_BYTES = 16_384
MAX_MAX_FRAME_BYTES = (1 << 24) - 1
MAX_WINDOW_BYTES = (1 << 31) - 1
MAX_STREAM_ID = (1 << 31) - 1


class ErrorCode(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ConnectionViolation(Exception):
    """The peer has broken the protocol or a limit such that the connection ends."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class StreamViolation(Exception):
    """The same, and only one stream ends."""

    def __init__(self, stream_id: int, code: ErrorCode) -> None:
        super().__init__(f"stream {stream_id}: {code.name}")
        self.stream_id = stream_id
        self.code = code


_HEADER = Struct(">IBI")
_SETTING = Struct(">HI")


def frame_header(size: int, kind: int, flags: int, stream_id: int) -> bytes:
    """Return what comes before a frame's ``size`` bytes."""
    # A length of 24 bits and a type of 8 are one number of 32 bits.
    return _HEADER.pack(size << 8 | kind, flags, stream_id)


def read_frame_header(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Return the size, type, flags and stream of the frame that begins at an offset."""
    word, flags, stream_id = _HEADER.unpack_from(data, at)
    return word >> 8, word & 0xFF, flags, stream_id & MAX_STREAM_ID


def headers_frame(stream_id: int, block: bytes, end_stream: bool = False) -> bytes:
    """Return a HEADERS frame with a whole header block, which must fit in one."""
    flags = END_HEADERS | END_STREAM if end_stream else END_HEADERS
    return _HEADER.pack(len(block) << 8 | HEADERS, flags, stream_id) + block


def settings_frame(settings: Mapping[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    payload = b"".join(_SETTING.pack(*each) for each in settings.items())
    return frame_header(len(payload), SETTINGS, 0, 0) + payload


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Return the settings of a frame, in their order; its size must be a multiple of 6."""
    return list(_SETTING.iter_unpack(payload))


_SIZES = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
_OF_THE_CONNECTION = {SETTINGS, PING, GOAWAY}


def require_size(kind: int, stream_id: int, size: int) -> None:
    """Raise :exc:`ConnectionViolation` if a frame of this type cannot be so, or not on this stream."""
    if stream_id and kind in _OF_THE_CONNECTION:
        raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"a frame of type {kind} on a stream")
    if size != _SIZES.get(kind, size) or (kind == GOAWAY and size < 8):
        raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, f"a frame of type {kind} with {size} bytes")


SETTINGS_ACK = frame_header(0, SETTINGS, ACK, 0)


def ping_frame(payload: bytes, flags: int = 0) -> bytes:
    """Return a PING of 8 bytes, or with ``ACK`` its answer."""
    return frame_header(8, PING, flags, 0) + payload


def rst_stream_frame(stream_id: int, code: int) -> bytes:
    """Return a RST_STREAM frame."""
    return frame_header(4, RST_STREAM, 0, stream_id) + code.to_bytes(4, "big")


def window_update_frame(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame_header(4, WINDOW_UPDATE, 0, stream_id) + increment.to_bytes(4, "big")


def goaway_frame(last_stream_id: int, code: int, reason: str) -> bytes:
    """Return a GOAWAY frame."""
    debug = reason.encode()
    payload = last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + debug
    return frame_header(len(payload), GOAWAY, 0, 0) + payload
