"""Frames as a client writes them, well or badly, and a connection that has begun."""

from __future__ import annotations

from hpack import Encoder

from vllm_pd_scheduler.http2 import Connection
from vllm_pd_scheduler.http2 import frames as f
from vllm_pd_scheduler.http2.events import ConnectionEnded, Event, StreamReset
from vllm_pd_scheduler.http2.frame_reader import FrameReader
from vllm_pd_scheduler.http2.header_block import write_block

REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/service/Method"),
    (b":authority", b"scheduler"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]
SETTINGS = f.settings_frame({})
OPENING = f.PREFACE + SETTINGS
BLOCK = write_block(REQUEST)


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    return f.frame_header(len(payload), kind, flags, stream_id) + payload


def headers(
    stream_id: int = 1, block: bytes = BLOCK, flags: int = f.END_HEADERS, payload: bytes | None = None
) -> bytes:
    return frame(f.HEADERS, flags, stream_id, block if payload is None else payload)


def data(stream_id: int = 1, payload: bytes = b"x", flags: int = 0) -> bytes:
    return frame(f.DATA, flags, stream_id, payload)


def indexed(fields: list[tuple[bytes, bytes]]) -> bytes:
    """A block of an encoder that uses a dynamic table, and Huffman's code."""
    return Encoder().encode(fields)


def begun() -> Connection:
    """A connection whose client has begun."""
    connection = Connection()
    assert connection.receive_data(OPENING, 0.0) == []
    connection.take_output()
    return connection


def sent(connection: Connection) -> list[tuple[int, int, int, bytes]]:
    """What a connection has sent since the last time, as type, flags, stream and payload."""
    reader = FrameReader()
    list(reader.read(f.PREFACE))
    return list(reader.read(b"".join(connection.take_output())))


def outcome(events: list[Event], connection: Connection) -> str:
    """What has become of what was received: an error of the connection, or of a stream, or none."""
    for kind, _, stream_id, payload in sent(connection):
        if kind == f.GOAWAY:
            assert isinstance(events[-1], ConnectionEnded)
            assert connection.ended
            return f"connection {f.ErrorCode(int.from_bytes(payload[4:8], 'big')).name}"
        if kind == f.RST_STREAM:
            code = f.ErrorCode(int.from_bytes(payload, "big"))
            resets = [each for each in events if isinstance(each, StreamReset) and not each.by_peer]
            assert not resets or resets[-1].code == code
            assert stream_id not in connection.streams
            return f"stream {code.name}"
    assert not connection.ended
    return "none"
