"""Whatever a client sends: nothing is raised, nothing grows without a limit, and cuts change nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.http2 import BLOCK, OPENING, REQUEST, data, frame, headers, indexed
from vllm_pd_scheduler.http2 import Connection
from vllm_pd_scheduler.http2 import frames as f
from vllm_pd_scheduler.http2.events import DataReceived, Event
from vllm_pd_scheduler.http2.header_block import EMPTY_TABLE, write_block

MANY = settings(max_examples=400, deadline=None)


def conversation() -> list[bytes]:
    """Frames of a client that does all that it may."""
    return [
        OPENING,
        headers(1, indexed(REQUEST)),
        data(1, b"\0\0\0\0\5hello"),
        f.SETTINGS_ACK,
        headers(3, EMPTY_TABLE + BLOCK),
        data(3, b"\x03abc\0\0\0", f.PADDED),
        f.ping_frame(b"12345678"),
        headers(5, BLOCK[:9], 0),
        frame(f.CONTINUATION, f.END_HEADERS, 5, BLOCK[9:]),
        f.window_update_frame(5, 1000),
        f.settings_frame({f.INITIAL_WINDOW_SIZE: 100, f.MAX_FRAME_SIZE: 20_000}),
        data(5, b"", f.END_STREAM),
        frame(f.PRIORITY, 0, 7, bytes(5)),
        headers(7, bytes(5) + BLOCK, f.END_HEADERS | f.WITH_PRIORITY),
        data(1, bytes(3000), f.END_STREAM),
        headers(3, write_block([(b"a", b"b")]), f.END_HEADERS | f.END_STREAM),
        frame(f.RST_STREAM, 0, 7, bytes(4)),
        frame(f.GOAWAY, 0, 0, bytes(8)),
    ]


def serve(chunks: list[bytes], answer: bool = True) -> tuple[list[Any], Connection]:
    """Send chunks, answer as a server does, and return what was told, with contents joined."""
    connection, told = Connection(), []
    for chunk in chunks:
        for event in connection.receive_data(chunk, 0.0):
            told.append(event)
            stream_id = getattr(event, "stream_id", 0)
            if answer and isinstance(event, DataReceived):
                connection.consumed(stream_id, len(event.data))
                if event.ended:
                    connection.send_headers(stream_id, b"")
                    connection.send_content(stream_id, [bytes(150)])
                    connection.end_stream(stream_id, b"")
        told += connection.pump()
        assert sum(map(len, connection.take_output())) < 1 << 20
        check(connection)
    return [view(event) for event in told], connection


def view(event: Event) -> object:
    head = getattr(event, "head", None)
    return event if head is None else (event.stream_id, head.fields, head.problem)  # type: ignore[union-attr]


def check(connection: Connection) -> None:
    """What may never be, whatever came."""
    assert len(connection._reader._rest) <= f.DEFAULT_MAX_FRAME_BYTES + f.FRAME_HEADER_BYTES + len(f.PREFACE)
    assert connection._credit._window >= 0 or connection.ended
    assert connection._output.window >= 0
    for stream in connection.streams.values():
        assert stream.window >= 0
        assert stream.unread >= 0


@given(st.binary(max_size=300), st.booleans())
@MANY
def test_bytes(junk: bytes, begun: bool) -> None:
    serve([OPENING + junk if begun else junk])


FRAMES = st.builds(
    frame,
    st.integers(0, 12),
    st.integers(0, 255),
    st.one_of(st.integers(0, 9), st.just(f.MAX_STREAM_ID)),
    st.one_of(
        st.binary(max_size=40), st.sampled_from([BLOCK, bytes(4), bytes(5), bytes(8), b"\x7f\xff\xff\xff"])
    ),
)


@given(st.lists(st.one_of(FRAMES, st.sampled_from(conversation())), max_size=30))
@MANY
def test_frames(sent: list[bytes]) -> None:
    serve([OPENING, *sent])


@given(st.data())
@MANY
def test_a_conversation_that_was_changed(choice: st.DataObject) -> None:
    """Frames lost, doubled or out of order, and bytes that are others."""
    sent = conversation()
    for _ in range(choice.draw(st.integers(0, 3))):
        at = choice.draw(st.integers(0, len(sent) - 1))
        match choice.draw(st.integers(0, 2)):
            case 0:
                del sent[at]
            case 1:
                sent.insert(choice.draw(st.integers(0, len(sent))), sent[at])
            case _:
                sent.append(sent.pop(at))
        sent = sent or [b""]
    stream = bytearray(b"".join(sent))
    for at in choice.draw(st.lists(st.integers(0, max(0, len(stream) - 1)), max_size=4)):
        if stream:
            stream[at] = choice.draw(st.integers(0, 255))
    serve([bytes(stream)])


@given(st.lists(st.integers(0, 4000), max_size=12), st.booleans())
@MANY
def test_cuts_change_nothing(cuts: list[int], broken: bool) -> None:
    stream = b"".join(conversation()) + (data(99) if broken else b"")
    at = [0, *sorted({min(cut, len(stream)) for cut in cuts}), len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(at)]
    expected, whole = serve([stream], answer=False)
    told, cut = serve(chunks, answer=False)
    assert told == expected
    assert whole.ended == cut.ended == broken


def test_every_cut() -> None:
    stream = b"".join(conversation())
    expected, _ = serve([stream], answer=False)
    assert serve([stream[at : at + 1] for at in range(len(stream))], answer=False)[0] == expected
    for at in range(len(stream)):
        assert serve([stream[:at], stream[at:]], answer=False)[0] == expected
