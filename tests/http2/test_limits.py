"""What a client may ask for within the protocol, and no more of it: floods, and what is never read."""

from collections.abc import Callable

import pytest

from tests.support.http2 import BLOCK, REQUEST, begun, data, frame, headers, outcome, sent
from vllm_pd_scheduler.http2 import connection as connection_module
from vllm_pd_scheduler.http2 import frames as f
from vllm_pd_scheduler.http2.header_block import (
    EMPTY_TABLE,
    MAX_BLOCK_BYTES,
    MAX_BLOCKS,
    MAX_CONTINUATIONS,
    MAX_LIST_BYTES,
    HeaderBlocks,
    write_block,
)
from vllm_pd_scheduler.http2.output import MAX_HELD_FRAMES

CALM = "connection ENHANCE_YOUR_CALM"

FLOODS: dict[str, Callable[[int], bytes]] = {
    "PING": lambda _: frame(f.PING, 0, 0, bytes(8)),
    "PING, acknowledged": lambda _: frame(f.PING, f.ACK, 0, bytes(8)),
    "SETTINGS": lambda _: f.settings_frame({}),
    "SETTINGS, acknowledged": lambda _: f.SETTINGS_ACK,
    "PRIORITY": lambda _: frame(f.PRIORITY, 0, 1, bytes(5)),
    "GOAWAY": lambda _: frame(f.GOAWAY, 0, 0, bytes(8)),
    "unknown": lambda _: frame(0x20),
    "DATA without content": lambda _: data(1, b""),
    "DATA of padding": lambda _: data(1, b"\x01\0", f.PADDED),
    "WINDOW_UPDATE": lambda _: f.window_update_frame(0, 1),
    "WINDOW_UPDATE of a stream": lambda _: f.window_update_frame(1, 1),
    "RST_STREAM of one that is over": lambda number: frame(f.RST_STREAM, 0, 1, bytes(4)),
    "rapid reset": lambda number: headers(3 + 2 * number) + frame(f.RST_STREAM, 0, 3 + 2 * number, bytes(4)),
    "streams that break the protocol": lambda number: headers(3 + 2 * number, write_block(REQUEST[1:])),
    "DATA on streams that are over": lambda number: headers(3 + 2 * number, flags=5) + data(3 + 2 * number),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_the_connection(name: str) -> None:
    connection, make = begun(), FLOODS[name]
    connection.receive_data(headers(1), 0.0)
    for number in range(20_000):
        events = connection.receive_data(make(number), 0.0)
        if connection.ended:
            break
        connection.take_output()
    assert outcome(events, connection) == CALM
    assert not connection.streams


@pytest.mark.parametrize("name", ["PING", "SETTINGS", "WINDOW_UPDATE"])
def test_the_same_over_a_day_does_not(name: str) -> None:
    connection, make = begun(), FLOODS[name]
    connection.receive_data(headers(1), 0.0)
    for number in range(20_000):
        connection.receive_data(make(number), number / 5)
    assert outcome([], connection) == "none"


def test_what_requests_need_is_no_flood() -> None:
    """Each may have some WINDOW_UPDATEs, PINGs and a reset after its answer, however fast they come."""
    connection = begun()
    for stream_id in range(1, 40_001, 2):
        connection.receive_data(headers(stream_id) + data(stream_id), 0.0)
        connection.send_headers(stream_id, b"")
        connection.receive_data(
            f.window_update_frame(0, 1)
            + f.window_update_frame(stream_id, 1)
            + FLOODS["PING"](0)
            + frame(f.RST_STREAM, 0, stream_id, bytes(4)),
            0.0,
        )
        connection.take_output()
    assert not connection.ended


@pytest.mark.parametrize("size", [0, 1, 8192])
def test_continuation_flood(size: int) -> None:
    """Without END_HEADERS a block would grow for ever, or be looked at for ever."""
    connection = begun()
    events = connection.receive_data(headers(1, BLOCK, 0), 0.0)
    for _ in range(MAX_CONTINUATIONS + 1):
        assert not connection.ended or size > 1
        events = connection.receive_data(frame(f.CONTINUATION, 0, 1, b"\0" * size), 0.0) or events
    assert outcome(events, connection) == CALM


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (write_block([*REQUEST, (b"a", b"v" * 8000), (b"b", b"v" * 7000)]), "none"),
        (write_block([*REQUEST, *((b"a", b"v" * 4000) for _ in range(5))]), CALM),
        (BLOCK + b"\x82" * (MAX_LIST_BYTES // 40), CALM),  # one byte for each field of 42
    ],
    ids=["some", "much", "bomb"],
)
def test_fields(block: bytes, expected: str) -> None:
    connection = begun()
    sent = headers(1, block[:16_000], 0) + frame(f.CONTINUATION, f.END_HEADERS, 1, block[16_000:])
    assert len(block) < MAX_BLOCK_BYTES
    assert outcome(connection.receive_data(sent, 0.0), connection) == expected


def test_header_blocks_that_are_remembered() -> None:
    """As many as there may be, and the largest are not."""
    blocks = HeaderBlocks()
    blocks.table_is_gone()
    blocks.read(EMPTY_TABLE + BLOCK)
    for number in range(5 * MAX_BLOCKS):
        block = BLOCK + write_block([(b"x-id", b"%d" % number)])
        assert blocks.read(block) is blocks.read(block)
        assert len(blocks._known) <= MAX_BLOCKS
    large = BLOCK + write_block([(b"x-id", b"v" * 2000)])
    assert blocks.read(large) is not blocks.read(large)


def test_streams_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_STREAMS", 3)
    connection = begun()
    opened = connection.receive_data(b"".join(headers(each) for each in (1, 3, 5)), 0.0)
    assert len(opened) == 3
    assert outcome(connection.receive_data(headers(7), 0.0), connection) == "stream REFUSED_STREAM"
    late = data(7) + frame(f.RST_STREAM, 0, 7, bytes(4))
    assert connection.receive_data(late, 0.0) == [], "it did not know yet"
    connection.reset_stream(3, f.ErrorCode.CANCEL)
    assert len(connection.receive_data(headers(9), 0.0)) == 1


def test_answers_that_are_not_read() -> None:
    """What a client asks for, and does not read, is kept in memory: not much of it."""
    connection = begun()
    connection.hold(True)
    events = []
    for number in range(1 + MAX_HELD_FRAMES):
        assert not connection.ended
        events = connection.receive_data(FLOODS["PING"](number), number)
    assert outcome(events, connection) == CALM


def test_what_comes_after_we_ended_a_stream_is_dropped() -> None:
    connection = begun()
    connection.receive_data(headers(1), 0.0)
    connection.end_stream(1, b"")
    assert [kind for kind, *_ in sent(connection)] == [f.HEADERS, f.RST_STREAM]
    late = data(1) + headers(1, write_block([(b"a", b"b")]), 5) + f.window_update_frame(1, 9)
    assert connection.receive_data(late + frame(f.RST_STREAM, 0, 1, bytes(4)), 0.0) == []
    assert outcome([], connection) == "none"


def test_no_new_streams_after_the_end_was_announced() -> None:
    connection = begun()
    connection.receive_data(headers(1), 0.0)
    connection.go_away()
    (goaway,) = sent(connection)
    assert goaway[3] == bytes((0, 0, 0, 1, 0, 0, 0, 0))
    assert connection.receive_data(headers(3) + data(3), 0.0) == []
    assert len(connection.receive_data(data(1), 0.0)) == 1, "those before go on"
    assert outcome([], connection) == "none"
