"""Windows: what a client may send before it is read, and what we may send before it says so."""

from itertools import pairwise

import pytest

from tests.support.http2 import begun, data, frame, headers, outcome, sent
from vllm_pd_scheduler.http2 import Connection
from vllm_pd_scheduler.http2 import frames as f
from vllm_pd_scheduler.http2.credit import CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES
from vllm_pd_scheduler.http2.events import DataWritten

MOST = f.DEFAULT_MAX_FRAME_BYTES


def opened(*stream_ids: int, window: int | None = None) -> Connection:
    connection = begun()
    if window is not None:
        connection.receive_data(f.settings_frame({f.INITIAL_WINDOW_SIZE: window}), 0.0)
    connection.receive_data(b"".join(map(headers, stream_ids)), 0.0)
    connection.take_output()
    return connection


def updates(connection: Connection) -> list[tuple[int, int]]:
    """Stream and increment of each WINDOW_UPDATE that was sent."""
    return [
        (each[2], int.from_bytes(each[3], "big")) for each in sent(connection) if each[0] == f.WINDOW_UPDATE
    ]


def contents(connection: Connection) -> list[tuple[int, int]]:
    """Stream and size of each DATA frame that was sent."""
    return [(each[2], len(each[3])) for each in sent(connection) if each[0] == f.DATA]


class TestReceived:
    def test_what_is_not_read_is_not_granted(self) -> None:
        connection = opened(1, 3)
        for _ in range(STREAM_WINDOW_BYTES // MOST):
            connection.receive_data(data(1, bytes(MOST)), 0.0)
        assert updates(connection) == []
        assert outcome(connection.receive_data(data(1), 0.0), connection) == "stream FLOW_CONTROL_ERROR"

    def test_what_is_read_is_granted_by_the_half_window(self) -> None:
        connection = opened(1)
        for _ in range(10):
            connection.receive_data(data(1, bytes(MOST)), 0.0)
            connection.consumed(1, MOST)
        assert updates(connection) == [(1, STREAM_WINDOW_BYTES // 2)]

    def test_all_streams_together(self) -> None:
        count = CONNECTION_WINDOW_BYTES // STREAM_WINDOW_BYTES
        streams = range(1, 2 * count + 3, 2)
        connection = opened(*streams)
        for stream_id in streams[:-1]:
            for _ in range(STREAM_WINDOW_BYTES // MOST):
                connection.receive_data(data(stream_id, bytes(MOST)), 0.0)
        assert outcome([], connection) == "none"
        last = connection.receive_data(data(streams[-1]), 0.0)
        assert outcome(last, connection) == "connection FLOW_CONTROL_ERROR"

    def test_a_stream_that_ends_gives_back_what_was_not_read(self) -> None:
        """For as many streams as there may be, one after another."""
        connection = begun()
        for stream_id in range(1, 4001, 2):
            connection.receive_data(headers(stream_id) + data(stream_id, bytes(MOST)), 0.0)
            connection.take_output()
            connection.reset_stream(stream_id, f.ErrorCode.CANCEL)
            connection.receive_data(data(stream_id, bytes(MOST)), 0.0)
        assert not connection.ended

    def test_padding_counts(self) -> None:
        connection = opened(1)
        for _ in range(STREAM_WINDOW_BYTES // 250 + 1):
            connection.receive_data(data(1, b"\xf8x" + bytes(248), f.PADDED), 0.0)
            connection.consumed(1, 1)
        assert len(updates(connection)) == 1
        assert not connection.ended

    def test_a_message_that_is_expected_is_granted_at_once(self) -> None:
        connection, size = opened(1), 4 << 20
        connection.receive_data(data(1, bytes(MOST)), 0.0)
        connection.consumed(1, MOST)
        connection.expect(1, size)
        assert updates(connection) == [(1, size - STREAM_WINDOW_BYTES + MOST)]
        for _ in range(size // MOST):
            connection.receive_data(data(1, bytes(MOST)), 0.0)
            connection.consumed(1, MOST)
        assert [each for each in updates(connection) if each[0]] == [(1, STREAM_WINDOW_BYTES // 2)] * 2
        assert connection.streams[1].window == STREAM_WINDOW_BYTES, "and nothing beyond it"


class TestSent:
    def test_within_the_windows_it_goes_at_once(self) -> None:
        connection = opened(1)
        assert connection.send_content(1, [b"abc", b"de"])
        assert [each[3] for each in sent(connection)] == [b"abcde"]

    def test_more_waits_and_is_told_when_it_is_out(self) -> None:
        connection = opened(1)
        content = bytes(range(256)) * 400
        assert not connection.send_content(1, [content[:7], content[7:]])
        assert connection.pump() == []
        frames = sent(connection)
        out = b"".join(each[3] for each in frames)
        assert len(out) == f.DEFAULT_WINDOW_BYTES
        assert max(len(each[3]) for each in frames) == MOST
        events = connection.receive_data(f.window_update_frame(1, 1 << 20), 0.0)
        assert events == [], "the connection's window is closed too"
        events = connection.receive_data(f.window_update_frame(0, 1 << 20), 0.0)
        assert events == [DataWritten(1)]
        assert out + b"".join(each[3] for each in sent(connection)) == content

    def test_trailers_come_after_content(self) -> None:
        connection = opened(1)
        connection.send_content(1, [bytes(70_000)])
        connection.end_stream(1, b"\x88")
        connection.pump()
        sent(connection)
        events = connection.receive_data(f.window_update_frame(0, 9999) + f.window_update_frame(1, 9999), 0.0)
        assert events == [DataWritten(1)]
        assert [each[0] for each in sent(connection)] == [f.DATA, f.HEADERS, f.RST_STREAM]
        assert not connection.streams

    def test_streams_take_turns(self) -> None:
        connection = opened(1, 3, window=1 << 20)
        connection.receive_data(f.window_update_frame(0, 1 << 24), 0.0)
        connection.send_content(1, [bytes(1 << 20)])
        connection.send_content(3, [bytes(1 << 20)])
        while connection.can_pump:
            connection.pump()
        order = [stream_id for stream_id, _ in contents(connection)]
        assert sum(a != b for a, b in pairwise(order)) > 20

    def test_one_that_is_stuck_holds_up_no_other(self) -> None:
        connection = opened(1, 3, window=10)
        connection.send_content(1, [bytes(100)])
        connection.send_content(3, [bytes(100)])
        connection.pump()
        connection.receive_data(f.window_update_frame(3, 1000), 0.0)
        assert contents(connection) == [(1, 10), (3, 10), (3, 90)]

    def test_a_setting_moves_the_windows_of_open_streams(self) -> None:
        connection = opened(1, window=0)
        connection.send_content(1, [bytes(100)])
        assert connection.pump() == []
        assert contents(connection) == []
        connection.receive_data(f.settings_frame({f.INITIAL_WINDOW_SIZE: 40}), 0.0)
        connection.receive_data(f.settings_frame({f.INITIAL_WINDOW_SIZE: 0}), 0.0)
        connection.receive_data(f.window_update_frame(1, 30), 0.0)
        assert contents(connection) == [(1, 40)], "the window was at -40"
        connection.receive_data(f.window_update_frame(1, 70), 0.0)
        assert contents(connection) == [(1, 60)]

    def test_a_transport_that_is_full(self) -> None:
        connection = opened(1)
        connection.hold(True)
        assert not connection.send_content(1, [b"x"])
        assert connection.pump() == []
        connection.receive_data(frame(f.PING, 0, 0, bytes(8)), 0.0)
        assert [each[0] for each in sent(connection)] == [f.PING]
        assert connection.hold(False) == [DataWritten(1)]
        assert contents(connection) == [(1, 1)]

    def test_of_a_stream_that_is_over_nothing_is_sent(self) -> None:
        connection = opened(1, window=10)
        connection.send_content(1, [bytes(100)])
        connection.receive_data(frame(f.RST_STREAM, 0, 1, bytes(4)), 0.0)
        connection.send_headers(1, b"")
        connection.end_stream(1, b"")
        assert not connection.send_content(1, [b"x"])
        assert connection.pump() == []
        assert sent(connection) == []

    @pytest.mark.parametrize("size", [1, 7])
    def test_tiny_windows_are_no_game(self, size: int) -> None:
        """A byte at a time costs a client as much as us, and not for long."""
        connection = opened(1, window=0)
        connection.send_content(1, [bytes(1 << 20)])
        events = []
        for _ in range(20_000):
            events = connection.receive_data(f.window_update_frame(1, size), 0.0)
            if connection.ended:
                break
        sent(connection)
        assert "without content" in events[-1].reason  # type: ignore[union-attr]
