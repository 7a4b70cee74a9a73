"""One connection of a client's, as a state machine: what it sends becomes events, what we answer bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import frames
from .budget import Budget
from .credit import STREAM_WINDOW_BYTES, Credit
from .events import (
    ConnectionEnded,
    DataReceived,
    DataWritten,
    Event,
    PingAnswered,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from .frame_reader import FrameReader, unpadded
from .frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    WITH_PRIORITY,
    ConnectionViolation,
    ErrorCode,
    StreamViolation,
)
from .header_block import EMPTY_TABLE, MAX_LIST_BYTES, Assembly, HeaderBlocks
from .output import Output
from .stream import ForgottenStreams, Stream

MAX_STREAMS = 10_000
"""Streams of one connection. Envoy opens another connection for more."""

EARNED_PER_STREAM = 8.0
"""Frames without content that a new stream pays for: a client has reasons for some with each request."""

MOVING = frozenset({DATA, HEADERS, CONTINUATION})
"""Types of frames that have content, or open a stream. There is a limit on all others."""

PUMP_BYTES = 1 << 20
"""Content that is put in frames at a time. To do so with more, and to send it, would keep others waiting."""


class Connection:
    """The server's side of an HTTP/2 connection. No I/O, no clock.

    ``receive_data`` takes what has come and returns events, however the bytes were cut. The other methods add
    to what :meth:`take_output` returns. What they say of a stream that is over meanwhile is dropped. Of a
    peer that breaks the protocol or a limit, ``receive_data`` tells last that the connection has ended.
    """

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.ended = False
        self.preface_received = False
        """Whether the peer has begun as it must, SETTINGS included."""
        self._budget = Budget(10_000, 1_000, "too many frames without content")
        self._settings_budget = Budget(100, 10, "too many SETTINGS")
        self._reset_budget = Budget(MAX_STREAMS, 5_000, "too many streams are opened and reset")
        """For streams that end before their answer has begun. All clients can leave at once, and then as many
        as could be served at most."""
        self._reader = FrameReader()
        self._blocks = HeaderBlocks()
        self._assembly: Assembly | None = None
        """A header block that has not come whole."""
        self._output = Output(self._budget)
        self._output.control(
            frames.settings_frame(
                {
                    frames.HEADER_TABLE_SIZE: 0,
                    frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                    frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
                    frames.MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES,
                }
            )
        )
        self._credit = Credit(self._output)
        self._first_block = EMPTY_TABLE
        self._now = 0.0
        self._last_stream = 0
        self._last_served: int | None = None
        """Set when the end was announced: later streams are not served."""
        self._forgotten = ForgottenStreams()
        self._events: list[Event] = []
        self._receivers: dict[int, Callable[[int, int, bytes], None]] = {
            DATA: self._receive_content,
            HEADERS: self._receive_headers,
            CONTINUATION: self._receive_continuation,
            frames.PRIORITY: self._receive_priority,
            frames.RST_STREAM: self._receive_reset,
            frames.SETTINGS: self._receive_settings,
            frames.PING: self._receive_ping,
            frames.WINDOW_UPDATE: self._receive_window_update,
            frames.PUSH_PROMISE: self._receive_push_promise,
        }

    # -- what comes

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Read what the peer has sent, at a time in seconds; return what it means. Raises nothing."""
        if self.ended:
            return []
        self._now = now
        try:
            for kind, flags, stream_id, payload in self._reader.read(data):
                try:
                    self._receive_frame(kind, flags, stream_id, payload)
                except StreamViolation as stream_violation:
                    self._violated(stream_violation)
            self._output.require_read()
        except ConnectionViolation as violation:
            self._end(violation)
        events, self._events = self._events, []
        return events

    def _receive_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if not self.preface_received:
            if kind != frames.SETTINGS or flags & ACK:
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "SETTINGS must come first")
            self.preface_received = True
        elif self._assembly is not None and (kind != CONTINUATION or stream_id != self._assembly.stream_id):
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "a header block is not ended")
        if kind not in MOVING:
            self._budget.spend(self._now)
            frames.require_size(kind, stream_id, len(payload))
        receiver = self._receivers.get(kind)
        if receiver is not None:
            receiver(flags, stream_id, payload)

    def _end(self, violation: ConnectionViolation) -> None:
        self.ended = True
        self._output.hold(False)
        last = self._last_stream if self._last_served is None else self._last_served
        self._output.control(frames.goaway_frame(last, violation.code, str(violation)))
        self._events.append(ConnectionEnded(violation.code, str(violation)))
        self.streams.clear()

    def _violated(self, violation: StreamViolation) -> None:
        self._reset_budget.spend(self._now)
        if violation.stream_id in self.streams:
            self._events.append(StreamReset(violation.stream_id, violation.code, by_peer=False))
        self._output.control(frames.rst_stream_frame(violation.stream_id, violation.code))
        self._close(violation.stream_id)
        self._forgotten.add(violation.stream_id)

    def _closed(self, stream_id: int) -> bool:
        """Whether a stream is over; raises if it was never there."""
        if stream_id in self.streams:
            return False
        if stream_id > self._last_stream or not stream_id & 1:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} was not opened")
        return True

    # -- content

    def _receive_content(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        data = unpadded(payload, True) if flags & PADDED else payload
        self._credit.take(size)
        stream, ended = self.streams.get(stream_id), bool(flags & END_STREAM)
        if stream is None or stream.peer_ended:
            self._credit.give(size)
            if stream is not None or (self._closed(stream_id) and stream_id not in self._forgotten):
                raise StreamViolation(stream_id, ErrorCode.STREAM_CLOSED)
            self._budget.spend(self._now)
            if ended:
                self._forgotten.discard(stream_id)
            return
        self._credit.take_on(stream, size)
        if size != len(data):
            self._credit.give_on(stream, size - len(data))
        if not data and not ended:
            self._budget.spend(self._now)
            return
        if stream.content_length is not None:
            stream.content_length -= len(data)
            if stream.content_length < 0 or (ended and stream.content_length):
                raise StreamViolation(stream_id, ErrorCode.PROTOCOL_ERROR)
        stream.peer_ended = ended
        self._events.append(DataReceived(stream_id, data, ended))

    def consumed(self, stream_id: int, size: int) -> None:
        """Record that ``size`` bytes of a stream's content were read: the peer may send as many more."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._credit.give_on(stream, size)

    def expect(self, stream_id: int, size: int) -> None:
        """Let the peer send ``size`` bytes of content at once: somebody takes them as they come."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._credit.expect(stream, size)

    # -- header blocks

    def _receive_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id & 1:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        if flags & (PADDED | WITH_PRIORITY):
            payload = unpadded(payload, bool(flags & PADDED), 5 if flags & WITH_PRIORITY else 0)
        if flags & END_HEADERS:
            self._receive_block(flags, stream_id, payload)
        else:
            self._assembly = Assembly(stream_id, flags, payload)

    def _receive_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        assembly = self._assembly
        if assembly is None:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        assembly.add(payload)
        if flags & END_HEADERS:
            self._assembly = None
            self._receive_block(assembly.flags, stream_id, assembly.whole())

    def _receive_block(self, flags: int, stream_id: int, block: bytes) -> None:
        head = self._blocks.read(block)  # also if it is refused: it may change what the next ones mean
        ended = bool(flags & END_STREAM)
        if stream_id <= self._last_stream:
            self._receive_trailers(stream_id, ended, head.trailers_problem)
            return
        self._last_stream = stream_id
        if self._last_served is not None:
            self._forgotten.add(stream_id)
            return
        if len(self.streams) >= MAX_STREAMS:
            raise StreamViolation(stream_id, ErrorCode.REFUSED_STREAM)
        if head.problem is not None or (ended and head.content_length):
            raise StreamViolation(stream_id, ErrorCode.PROTOCOL_ERROR)
        self._budget.earn(EARNED_PER_STREAM)
        stream = Stream(stream_id, STREAM_WINDOW_BYTES, self._output.initial_window)
        stream.peer_ended, stream.content_length = ended, head.content_length
        self.streams[stream_id] = stream
        self._events.append(RequestReceived(stream_id, head, ended))

    def _receive_trailers(self, stream_id: int, ended: bool, problem: str | None) -> None:
        stream = self.streams.get(stream_id)
        if stream is None and stream_id in self._forgotten:
            self._budget.spend(self._now)
            return
        if stream is None:
            raise ConnectionViolation(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream_id}: it is over")
        if stream.peer_ended:
            raise StreamViolation(stream_id, ErrorCode.STREAM_CLOSED)
        if not ended or problem is not None or stream.content_length:
            raise StreamViolation(stream_id, ErrorCode.PROTOCOL_ERROR)
        stream.peer_ended = True
        self._events.append(StreamEnded(stream_id))

    # -- what costs the peer nothing

    def _receive_priority(self, _: int, stream_id: int, __: bytes) -> None:
        if not stream_id:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "PRIORITY of the connection")

    def _receive_push_promise(self, *_: object) -> None:
        raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE of a client")

    def _receive_ping(self, flags: int, _: int, payload: bytes) -> None:
        if flags & ACK:
            self._events.append(PingAnswered())
        else:
            self._output.control(frames.ping_frame(payload, ACK))

    def _receive_settings(self, flags: int, _: int, payload: bytes) -> None:
        if len(payload) % 6 or (flags & ACK and payload):
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS")
        self._settings_budget.spend(self._now)
        if flags & ACK:
            self._blocks.table_is_gone()
            return
        self._output.apply(frames.read_settings(payload), self.streams.values())
        self._output.control(frames.SETTINGS_ACK)
        self._pump()

    def _receive_window_update(self, _: int, stream_id: int, payload: bytes) -> None:
        increment = int.from_bytes(payload, "big") & frames.MAX_WINDOW_BYTES
        if stream_id == 0:
            if not increment:
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._output.widen(increment)
        elif self._closed(stream_id):
            return
        elif not increment:
            raise StreamViolation(stream_id, ErrorCode.PROTOCOL_ERROR)
        else:
            self._output.widen_stream(self.streams[stream_id], increment)
        self._pump()

    def _receive_reset(self, _: int, stream_id: int, payload: bytes) -> None:
        if self._closed(stream_id):
            self._forgotten.discard(stream_id)
            return
        stream = self.streams[stream_id]
        if not stream.answered:
            self._reset_budget.spend(self._now)
        stream.peer_ended = True
        self._events.append(StreamReset(stream_id, int.from_bytes(payload, "big"), by_peer=True))
        self._close(stream_id)

    # -- what is sent

    def send_headers(self, stream_id: int, block: bytes) -> None:
        """Begin an answer with a header block of ``write_block``."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.answered = True
            self._output.control(frames.headers_frame(stream_id, self._first_block + block))
            self._first_block = b""

    def send_content(self, stream_id: int, parts: Sequence[bytes | memoryview]) -> bool:
        """Send content; return whether all of it is among the bytes to send.

        Otherwise, if the stream is not over, :class:`~.events.DataWritten` tells when it is. The rest of it
        must not change until then.
        """
        stream = self.streams.get(stream_id)
        return stream is not None and self._output.content(stream, parts)

    def end_stream(self, stream_id: int, block: bytes) -> None:
        """End a stream with a header block, after its content; what the peer still sends is dropped."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        stream.answered = True
        block, self._first_block = self._first_block + block, b""
        if self._output.end(stream, block):
            self._finished(stream)

    def reset_stream(self, stream_id: int, code: ErrorCode) -> None:
        """End a stream now."""
        if stream_id in self.streams:
            self._output.control(frames.rst_stream_frame(stream_id, code))
            self._close(stream_id)

    def _finished(self, stream: Stream) -> None:
        if not stream.peer_ended:
            self._output.control(frames.rst_stream_frame(stream.id, ErrorCode.NO_ERROR))
        self._close(stream.id)

    def _close(self, stream_id: int) -> None:
        stream = self.streams.pop(stream_id, None)
        if stream is None:
            return
        self._output.drop(stream)
        self._credit.give(stream.unread)
        if not stream.peer_ended:
            self._forgotten.add(stream_id)

    def ping(self) -> None:
        """Ask the peer whether it is there: :class:`~.events.PingAnswered` comes."""
        self._output.control(frames.ping_frame(bytes(8)))

    def go_away(self) -> None:
        """Announce the end: streams that are open go on, no others are served."""
        if self._last_served is None and not self.ended:
            self._last_served = self._last_stream
            self._output.control(frames.goaway_frame(self._last_stream, ErrorCode.NO_ERROR, ""))

    def hold(self, held: bool) -> list[Event]:
        """Say whether the transport takes no more for now; return what can be told when it does again."""
        self._output.hold(held)
        return self.pump()

    def pump(self) -> list[Event]:
        """Put the next of the content that waits among the bytes to send."""
        self._pump()
        events, self._events = self._events, []
        return events

    def _pump(self) -> None:
        for stream in self._output.pump(PUMP_BYTES):
            self._events.append(DataWritten(stream.id))
            if stream.trailers is not None and self._output.end(stream, stream.trailers):
                self._finished(stream)

    @property
    def can_pump(self) -> bool:
        """Whether :meth:`pump` would send something."""
        return not self.ended and self._output.can_pump

    def take_output(self) -> list[bytes | memoryview]:
        """Return the bytes to send, and forget them."""
        buffers, self._output.buffers = self._output.buffers, []
        return buffers
