"""The same conversations with ``h2``, a client that others have written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.http2 import REQUEST
from vllm_pd_scheduler.http2 import Connection, credit
from vllm_pd_scheduler.http2 import events as ours
from vllm_pd_scheduler.http2.header_block import write_block

HEAD = write_block([(b":status", b"200"), (b"content-type", b"application/grpc")])
TRAILERS = write_block([(b"grpc-status", b"0"), (b"grpc-message", b"x" * 300)])


class Pair:
    """A client and our connection, whose server sends back what it gets."""

    def __init__(self, **settings: int) -> None:
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self.server = Connection()
        self.client.initiate_connection()
        if settings:
            self.client.update_settings(
                {getattr(SettingCodes, name): value for name, value in settings.items()}
            )
        self.told: list[Event] = []
        self.echoes: dict[int, list[bytes]] = {}
        self.exchange()

    def exchange(self) -> None:
        """Carry bytes to and fro until there are none."""
        while True:
            there = self.client.data_to_send()
            self._serve(self.server.receive_data(there, 0.0) if there else [])
            while self.server.can_pump:
                self._serve(self.server.pump())
            back = b"".join(self.server.take_output())
            for event in self.client.receive_data(back) if back else []:
                self.told.append(event)
                if isinstance(event, DataReceived):
                    self.client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if not there and not back:
                return

    def _serve(self, events: list[ours.Event]) -> None:
        for event in events:
            if isinstance(event, ours.RequestReceived):
                self.echoes[event.stream_id] = []
                self.server.send_headers(event.stream_id, HEAD)
            elif isinstance(event, ours.DataReceived):
                self.server.consumed(event.stream_id, len(event.data))
                self.echoes[event.stream_id].append(event.data)
                if event.ended:
                    self.server.send_content(event.stream_id, self.echoes.pop(event.stream_id))
                    self.server.end_stream(event.stream_id, TRAILERS)

    def request(self, content: bytes, padding: int | None = None) -> int:
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, REQUEST)
        while content:
            room = min(self.client.local_flow_control_window(stream_id), self.client.max_outbound_frame_size)
            size = min(room - (0 if padding is None else padding + 1), len(content))
            if size <= 0:
                self.exchange()
                continue
            self.client.send_data(stream_id, content[:size], pad_length=padding)
            content = content[size:]
        self.client.end_stream(stream_id)
        return stream_id

    def answer(self, stream_id: int) -> bytes:
        """What came back, whole and in order."""
        mine = [event for event in self.told if getattr(event, "stream_id", None) == stream_id]
        assert isinstance(mine[0], ResponseReceived)
        assert isinstance(mine[-2], TrailersReceived)
        assert isinstance(mine[-1], StreamEnded)
        return b"".join(event.data for event in mine if isinstance(event, DataReceived))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    assert not [event for event in made.told if isinstance(event, ConnectionTerminated)]


def test_requests(pair: Pair) -> None:
    for number in range(20):
        content = bytes([number]) * (1 + 7 * number)
        stream_id = pair.request(content)
        pair.exchange()
        assert pair.answer(stream_id) == content
    assert not pair.server.streams


@given(
    st.lists(st.integers(1, 200_000), min_size=1, max_size=5),
    st.integers(1, 100_000),
    st.sampled_from([None, 0, 9]),
)
@settings(max_examples=40, deadline=None)
def test_large_ones_in_small_windows(sizes: list[int], window: int, padding: int | None) -> None:
    window = max(window, max(sizes) // 200)
    pair = Pair(INITIAL_WINDOW_SIZE=window)
    contents = {pair.request(bytes([size % 256]) * size, padding): size for size in sizes}
    pair.exchange()
    for stream_id, size in contents.items():
        assert pair.answer(stream_id) == bytes([size % 256]) * size
    assert not pair.server.streams


def test_more_than_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "CONNECTION_WINDOW_BYTES", 1 << 20)
    pair = Pair()
    content = bytes(range(256)) * (5 << 10)
    stream_id = pair.request(content)
    pair.exchange()
    assert pair.answer(stream_id) == content


def test_ping(pair: Pair) -> None:
    pair.client.ping(b"12345678")
    pair.exchange()
    assert [event.ping_data for event in pair.told if isinstance(event, PingAckReceived)] == [b"12345678"]
    pair.server.ping()
    assert pair.client.receive_data(b"".join(pair.server.take_output()))
    assert pair.server.receive_data(pair.client.data_to_send(), 0.0) == [ours.PingAnswered()]


def test_a_stream_that_is_reset(pair: Pair) -> None:
    stream_id = pair.client.get_next_available_stream_id()
    pair.client.send_headers(stream_id, REQUEST)
    pair.exchange()
    pair.client.reset_stream(stream_id, 8)
    assert pair.server.receive_data(pair.client.data_to_send(), 0.0) == [ours.StreamReset(stream_id, 8, True)]
    other = pair.client.get_next_available_stream_id()
    pair.client.send_headers(other, REQUEST)
    pair.exchange()
    pair.server.reset_stream(other, 2)  # type: ignore[arg-type]
    pair.exchange()
    assert [event.error_code for event in pair.told if isinstance(event, StreamReset)] == [2]


def test_a_client_that_allows_no_dynamic_table() -> None:
    """It wants to be told that there is none, with the first header block."""
    pair = Pair(HEADER_TABLE_SIZE=0)
    stream_id = pair.request(b"x")
    pair.exchange()
    assert pair.answer(stream_id) == b"x"


def test_the_end(pair: Pair) -> None:
    stream_id = pair.client.get_next_available_stream_id()
    pair.client.send_headers(stream_id, REQUEST)
    pair.exchange()
    pair.server.go_away()
    pair.client.send_data(stream_id, b"x", end_stream=True)
    (goaway,) = [
        each
        for each in pair.client.receive_data(b"".join(pair.server.take_output()))
        if isinstance(each, ConnectionTerminated)
    ]
    assert (goaway.error_code, goaway.last_stream_id) == (0, stream_id)
