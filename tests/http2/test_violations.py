# ruff: noqa: E501
"""What breaks the protocol, section by section of RFC 9113, and how it ends: after h2spec's tables."""

import pytest

from tests.support.http2 import (
    BLOCK,
    OPENING,
    REQUEST,
    SETTINGS,
    begun,
    data,
    frame,
    headers,
    indexed,
    outcome,
)
from vllm_pd_scheduler.http2 import Connection
from vllm_pd_scheduler.http2 import frames as f
from vllm_pd_scheduler.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    WINDOW_UPDATE,
    WITH_PRIORITY,
)
from vllm_pd_scheduler.http2.header_block import EMPTY_TABLE, write_block

MOST = f.DEFAULT_MAX_FRAME_BYTES
OPEN = headers(1)
ENDED = headers(1, flags=END_HEADERS | END_STREAM)
RESET = frame(RST_STREAM, 0, 1, bytes(4))
WIDEST = f.window_update_frame(1, f.MAX_WINDOW_BYTES)


def setting(name: int, value: int) -> bytes:
    return f.settings_frame({name: value})


def request(*more: tuple[bytes, bytes], without: bytes = b"") -> bytes:
    return headers(1, write_block([each for each in REQUEST if each[0] != without] + list(more)))


def reordered() -> bytes:
    return headers(1, write_block([REQUEST[-1], *REQUEST[:-1]]))


CASES = [
    # section, what is sent after the opening, how it ends
    ("3.4 not SETTINGS first", None, "connection PROTOCOL_ERROR"),
    ("4.1 an unknown type is ignored", frame(0x16, 0xFF, 0, b"x") + frame(0x16, 0, 1), "none"),
    ("4.1 unknown flags are ignored", frame(PING, 0xF0 & ~ACK, 0, bytes(8)), "none"),
    ("4.1 the reserved bit is ignored", frame(PING, 0, 1 << 31, bytes(8)), "none"),
    ("4.2 the largest frame", OPEN + data(1, bytes(MOST)), "none"),
    ("4.2 DATA too large", OPEN + data(1, bytes(MOST + 1)), "connection FRAME_SIZE_ERROR"),
    ("4.2 unknown frame too large", frame(0x16, 0, 0, bytes(MOST + 1)), "connection FRAME_SIZE_ERROR"),
    ("4.3 no block", headers(1, b"\xff\xff\xff\xff\xff\xff"), "connection COMPRESSION_ERROR"),
    ("4.3 index 0", headers(1, b"\x80"), "connection COMPRESSION_ERROR"),
    ("4.3 an index that is not there", headers(1, b"\xfe"), "connection COMPRESSION_ERROR"),
    ("4.3 truncated", headers(1, BLOCK[:-1]), "connection COMPRESSION_ERROR"),
    ("4.3 another frame within a block", headers(1, BLOCK[:5], 0) + data(1), "connection PROTOCOL_ERROR"),
    (
        "4.3 another stream's within a block",
        headers(1, BLOCK[:5], 0) + frame(CONTINUATION, END_HEADERS, 3, BLOCK[5:]),
        "connection PROTOCOL_ERROR",
    ),
    ("5.1 idle: DATA", data(1), "connection PROTOCOL_ERROR"),
    ("5.1 idle: RST_STREAM", RESET, "connection PROTOCOL_ERROR"),
    ("5.1 idle: WINDOW_UPDATE", f.window_update_frame(1, 1), "connection PROTOCOL_ERROR"),
    ("5.1 idle: CONTINUATION", frame(CONTINUATION, END_HEADERS, 1, BLOCK), "connection PROTOCOL_ERROR"),
    ("5.1 idle: PRIORITY", frame(PRIORITY, 0, 1, bytes(5)), "none"),
    ("5.1 half-closed: DATA", ENDED + data(1), "stream STREAM_CLOSED"),
    ("5.1 half-closed: HEADERS", ENDED + headers(1), "stream STREAM_CLOSED"),
    ("5.1 half-closed: others", ENDED + f.window_update_frame(1, 1) + RESET, "none"),
    ("5.1 closed: DATA", OPEN + RESET + data(1), "stream STREAM_CLOSED"),
    ("5.1 closed: HEADERS", OPEN + RESET + headers(1), "connection STREAM_CLOSED"),
    ("5.1 closed: others", OPEN + RESET + RESET + f.window_update_frame(1, 0), "none"),
    ("5.1.1 even", headers(2), "connection PROTOCOL_ERROR"),
    ("5.1.1 lower", headers(5) + headers(3), "connection STREAM_CLOSED"),
    ("5.1.1 zero", headers(0), "connection PROTOCOL_ERROR"),
    ("6.1 DATA of the connection", data(0), "connection PROTOCOL_ERROR"),
    ("6.1 padding", OPEN + data(1, b"\x03abc\0\0\0", PADDED), "none"),
    ("6.1 nothing but padding", OPEN + data(1, b"\x03\0\0\0", PADDED), "none"),
    ("6.1 more padding than frame", OPEN + data(1, b"\x04\0\0\0", PADDED), "connection PROTOCOL_ERROR"),
    ("6.1 no padding", OPEN + data(1, b"", PADDED), "connection FRAME_SIZE_ERROR"),
    ("6.2 padding", headers(1, b"\x02" + BLOCK + bytes(2), END_HEADERS | PADDED), "none"),
    (
        "6.2 more padding than frame",
        headers(1, b"\xff" + BLOCK, END_HEADERS | PADDED),
        "connection PROTOCOL_ERROR",
    ),
    ("6.2 priority", headers(1, bytes(5) + BLOCK, END_HEADERS | WITH_PRIORITY), "none"),
    ("6.2 no priority", headers(1, bytes(4), END_HEADERS | WITH_PRIORITY), "connection FRAME_SIZE_ERROR"),
    ("6.3 PRIORITY of the connection", frame(PRIORITY, 0, 0, bytes(5)), "connection PROTOCOL_ERROR"),
    ("6.3 PRIORITY's size", frame(PRIORITY, 0, 1, bytes(4)), "connection FRAME_SIZE_ERROR"),
    ("6.4 RST_STREAM of the connection", frame(RST_STREAM, 0, 0, bytes(4)), "connection PROTOCOL_ERROR"),
    ("6.4 RST_STREAM's size", OPEN + frame(RST_STREAM, 0, 1, bytes(3)), "connection FRAME_SIZE_ERROR"),
    ("6.5 an ACK", frame(f.SETTINGS, ACK), "none"),
    ("6.5 an ACK with content", frame(f.SETTINGS, ACK, 0, bytes(6)), "connection FRAME_SIZE_ERROR"),
    ("6.5 SETTINGS on a stream", frame(f.SETTINGS, 0, 1), "connection PROTOCOL_ERROR"),
    ("6.5 SETTINGS' size", frame(f.SETTINGS, 0, 0, bytes(5)), "connection FRAME_SIZE_ERROR"),
    ("6.5.2 ENABLE_PUSH", setting(f.ENABLE_PUSH, 2), "connection PROTOCOL_ERROR"),
    ("6.5.2 the window", setting(f.INITIAL_WINDOW_SIZE, 1 << 31), "connection FLOW_CONTROL_ERROR"),
    ("6.5.2 small frames", setting(f.MAX_FRAME_SIZE, MOST - 1), "connection PROTOCOL_ERROR"),
    ("6.5.2 large frames", setting(f.MAX_FRAME_SIZE, 1 << 24), "connection PROTOCOL_ERROR"),
    ("6.5.2 an unknown setting", setting(0xFF, 1), "none"),
    ("6.6 PUSH_PROMISE", OPEN + frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), "connection PROTOCOL_ERROR"),
    ("6.7 PING on a stream", frame(PING, 0, 1, bytes(8)), "connection PROTOCOL_ERROR"),
    ("6.7 PING's size", frame(PING, 0, 0, bytes(6)), "connection FRAME_SIZE_ERROR"),
    ("6.8 GOAWAY", frame(GOAWAY, 0, 0, bytes(8)) + OPEN, "none"),
    ("6.8 GOAWAY on a stream", frame(GOAWAY, 0, 1, bytes(8)), "connection PROTOCOL_ERROR"),
    ("6.8 GOAWAY's size", frame(GOAWAY, 0, 0, bytes(7)), "connection FRAME_SIZE_ERROR"),
    ("6.9 WINDOW_UPDATE of 0", f.window_update_frame(0, 0), "connection PROTOCOL_ERROR"),
    ("6.9 WINDOW_UPDATE of 0, stream", OPEN + f.window_update_frame(1, 0), "stream PROTOCOL_ERROR"),
    ("6.9 WINDOW_UPDATE's size", frame(WINDOW_UPDATE, 0, 0, bytes(3)), "connection FRAME_SIZE_ERROR"),
    ("6.9.1 over 2^31-1", f.window_update_frame(0, f.MAX_WINDOW_BYTES), "connection FLOW_CONTROL_ERROR"),
    ("6.9.1 over 2^31-1, stream", OPEN + WIDEST, "stream FLOW_CONTROL_ERROR"),
    (
        "6.9.2 over 2^31-1 by a setting",
        OPEN + f.window_update_frame(1, 1) + setting(f.INITIAL_WINDOW_SIZE, f.MAX_WINDOW_BYTES),
        "connection FLOW_CONTROL_ERROR",
    ),
    ("6.9.2 below 0 by a setting", OPEN + setting(f.INITIAL_WINDOW_SIZE, 0), "none"),
    ("6.10 CONTINUATION after the end", OPEN + frame(CONTINUATION, 0, 1), "connection PROTOCOL_ERROR"),
    ("6.10 CONTINUATION of the connection", frame(CONTINUATION, 0, 0), "connection PROTOCOL_ERROR"),
    (
        "6.10 CONTINUATION",
        headers(1, BLOCK[:5], 0) + frame(CONTINUATION, 0, 1, BLOCK[5:6]) + frame(CONTINUATION, 4, 1, BLOCK[6:]),
        "none",
    ),
    ("8.1 trailers", OPEN + headers(1, write_block([(b"a", b"b")]), END_HEADERS | END_STREAM), "none"),
    ("8.1 trailers that do not end", OPEN + headers(1, write_block([(b"a", b"b")])), "stream PROTOCOL_ERROR"),
    ("8.1 pseudo fields in trailers", OPEN + ENDED, "stream PROTOCOL_ERROR"),
    ("8.1.1 less than content-length", request((b"content-length", b"2")) + data(1, b"x", END_STREAM), "stream PROTOCOL_ERROR"),
    ("8.1.1 more than content-length", request((b"content-length", b"2")) + data(1, b"xxx"), "stream PROTOCOL_ERROR"),
    ("8.1.1 content-length", request((b"content-length", b"2")) + data(1, b"xx", END_STREAM), "none"),
    ("8.1.1 no number", request((b"content-length", b"-2")), "stream PROTOCOL_ERROR"),
    ("8.2 upper case", request((b"X-Upper", b"1")), "stream PROTOCOL_ERROR"),
    ("8.2 no name", request((b"", b"1")), "stream PROTOCOL_ERROR"),
    ("8.2 a line's end in a value", request((b"a", b"b\r\nc: d")), "stream PROTOCOL_ERROR"),
    ("8.2 blanks around a value", request((b"a", b" b")), "stream PROTOCOL_ERROR"),
    ("8.2.2 connection", request((b"connection", b"keep-alive")), "stream PROTOCOL_ERROR"),
    ("8.2.2 transfer-encoding", request((b"transfer-encoding", b"chunked")), "stream PROTOCOL_ERROR"),
    ("8.2.2 te", request((b"te", b"trailers, deflate"), without=b"te"), "stream PROTOCOL_ERROR"),
    ("8.3 unknown pseudo", headers(1, write_block([(b":status", b"200"), *REQUEST])), "stream PROTOCOL_ERROR"),
    ("8.3 after others", reordered(), "stream PROTOCOL_ERROR"),
    ("8.3.1 doubled", headers(1, write_block([REQUEST[0], *REQUEST])), "stream PROTOCOL_ERROR"),
    ("8.3.1 no :method", request(without=b":method"), "stream PROTOCOL_ERROR"),
    ("8.3.1 no :scheme", request(without=b":scheme"), "stream PROTOCOL_ERROR"),
    ("8.3.1 no :path", request(without=b":path"), "stream PROTOCOL_ERROR"),
    ("8.3.1 an empty :path", headers(1, write_block([*REQUEST[:2], (b":path", b""), *REQUEST[3:]])), "stream PROTOCOL_ERROR"),
]  # fmt: skip


@pytest.mark.parametrize(("_section", "sent", "expected"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "by-byte"])
def test_case(_section: str, sent: bytes | None, expected: str, cut: bool) -> None:
    if sent is None:
        connection, sent = Connection(), f.PREFACE + frame(PING, 0, 0, bytes(8))
        connection.take_output()
    else:
        connection = begun()
    chunks = [sent[at : at + 1] for at in range(len(sent))] if cut else [sent]
    events = [event for chunk in chunks for event in connection.receive_data(chunk, 0.0)]
    assert outcome(events, connection) == expected
    if connection.ended:
        assert connection.receive_data(headers(7), 0.0) == []
    else:  # and it goes on
        more = connection.receive_data(headers(9, EMPTY_TABLE + BLOCK), 0.0)
        assert [type(event).__name__ for event in more] == ["RequestReceived"]


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"P", f.PREFACE[:-1] + b"!", b"\0" * 30])
def test_what_is_not_http2(sent: bytes) -> None:
    connection = Connection()
    connection.take_output()
    ended = [event for at in range(len(sent)) for event in connection.receive_data(sent[at : at + 1], 0.0)]
    expected = "none" if sent == b"P" else "connection PROTOCOL_ERROR"
    assert outcome(ended, connection) == expected
    assert not connection.preface_received


class TestDynamicTable:
    """A client may use one until it has acknowledged that it must not."""

    def test_before(self) -> None:
        connection = begun()
        block = indexed(REQUEST)
        for stream_id in (1, 3):
            (event,) = connection.receive_data(headers(stream_id, block), 0.0)
            assert event.head.fields[b":path"] == b"/service/Method"  # type: ignore[union-attr]

    def test_after(self) -> None:
        """It must say that it has none, by a change of its size."""
        for block, expected in (
            (indexed(REQUEST), "connection COMPRESSION_ERROR"),
            (b"\x20" + indexed(REQUEST), "none"),
            (b"\x21" + indexed(REQUEST), "connection COMPRESSION_ERROR"),
        ):
            connection = begun()
            connection.receive_data(headers(1, indexed(REQUEST)) + f.SETTINGS_ACK, 0.0)
            assert outcome(connection.receive_data(headers(3, block), 0.0), connection) == expected

    def test_blocks_are_remembered_only_then(self) -> None:
        """While there is a table, the same bytes may mean something else."""
        connection = begun()
        first = connection.receive_data(headers(1, indexed(REQUEST)) + headers(3, indexed(REQUEST)), 0.0)
        second = connection.receive_data(
            f.SETTINGS_ACK + headers(5, b"\x20" + BLOCK) + headers(7) + headers(9), 0.0
        )
        heads = [event.head for event in first + second]  # type: ignore[union-attr]
        assert heads[0] is not heads[1]
        assert heads[2] is not heads[3]
        assert heads[3] is heads[4]


def test_settings_come_first() -> None:
    connection = Connection()
    assert b"".join(connection.take_output()).startswith(b"\0\0\x18\x04\0")
    connection.receive_data(OPENING + SETTINGS, 0.0)
    assert b"".join(connection.take_output()) == 2 * f.SETTINGS_ACK
    assert connection.preface_received


def test_kinds_are_those_of_the_rfc() -> None:
    assert tuple(range(8)) == (DATA, HEADERS, PRIORITY, RST_STREAM, f.SETTINGS, PUSH_PROMISE, PING, GOAWAY)
