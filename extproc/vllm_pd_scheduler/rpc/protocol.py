"""One connection on an asyncio transport: reads events, hands them to calls, writes what there is to send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..http2 import Connection
from ..http2 import events as events_of
from ..http2.events import Event
from .call import Call, Method
from .status import CallError, StatusCode, http_error, trailers

KEEPALIVE_INTERVAL_S = 5.0
"""Seconds of silence after which a client is asked whether it is still there."""

KEEPALIVE_TIMEOUT_S = 8.0
"""Seconds that it has to answer. Then its connection is closed, and what its streams held is given back: the
streams of an Envoy whose machine lost power would stay until TCP gives up, which is hours."""

DOUBT_S = 0.1
"""A loop that stood still may not have read the answer yet: it reads for so long before it closes."""

PREFACE_S = 10.0
"""Seconds in which a client must have begun to speak HTTP/2."""

CLOSE_S = 1.0
"""Seconds in which a client must have read why its connection is closed."""

WRITE_BUFFER_BYTES = 1 << 20
"""What the transport keeps for a client that reads slowly, before content waits."""

JOIN_BYTES = 64 << 10
"""What is sent together and is smaller is copied together."""


class Owner(Protocol):
    """The server that a connection belongs to."""

    def began(self, connection: GrpcProtocol) -> None:
        """Learn that a connection is there."""
        ...

    def ended(self, connection: GrpcProtocol) -> None:
        """Learn that it is no more."""
        ...

    def complain(self, what: str) -> None:
        """Learn of a client that sends what is wrong."""
        ...


class GrpcProtocol(asyncio.Protocol):
    """Serves the calls of one connection; ``methods`` are by path."""

    def __init__(self, methods: Mapping[bytes, Method], owner: Owner) -> None:
        self.connection = Connection()
        self.loop = asyncio.get_running_loop()
        self.unfinished = 0
        self._methods = methods
        self._owner = owner
        self._calls: dict[int, Call] = {}
        self._transport: Any = None
        self._flushing = False
        """Whether what there is to send will be sent in this turn of the loop."""
        self._began = self._heard = 0.0
        self._asked: float | None = None
        """When the client was asked whether it is there, if it has not said anything since."""
        self._alarm: asyncio.TimerHandle | None = None
        self._on: dict[type[Event], Callable[[Any], None]] = {
            events_of.RequestReceived: self._request_received,
            events_of.DataReceived: self._data_received,
            events_of.StreamEnded: self._stream_ended,
            events_of.StreamReset: self._stream_reset,
            events_of.DataWritten: self._data_written,
            events_of.PingAnswered: self._ping_answered,
            events_of.ConnectionEnded: self._connection_ended,
        }

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: say what we allow, and look after the client from now on."""
        self._transport = transport
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._began = self._heard = self.loop.time()
        self._alarm = self.loop.call_later(min(PREFACE_S, KEEPALIVE_INTERVAL_S), self._look_after)
        self.flush()
        self._owner.began(self)

    def data_received(self, data: bytes) -> None:
        """Read what the client has sent."""
        self._heard = now = self.loop.time()
        self._flushing = True  # at the end of this
        self._tell(self.connection.receive_data(data, now))
        self._flush()

    def eof_received(self) -> None:
        """The client is gone."""
        self.connection.ended = True
        self._cancel_calls()

    def connection_lost(self, error: Exception | None) -> None:
        """Nothing can be sent or will come any more."""
        if self._alarm is not None:
            self._alarm.cancel()
        self.connection.ended = True
        self._cancel_calls()
        self._owner.ended(self)

    def pause_writing(self) -> None:
        """The client reads slowly."""
        self.connection.hold(True)

    def resume_writing(self) -> None:
        """It has read most of it."""
        self._tell(self.connection.hold(False))
        self.flush()

    # -- for calls

    @property
    def is_open(self) -> bool:
        """Whether something that is written now goes out."""
        return not self.connection.ended and not self._transport.is_closing()

    def forget(self, call: Call) -> None:
        """Tell a call nothing more."""
        self._calls.pop(call.stream_id, None)

    def complain(self, call: Call, error: CallError) -> None:
        """Learn that a client sends what a call cannot have."""
        self._owner.complain(f"a call of {call.head.fields[b':path'].decode()} was ended: {error}")

    def flush(self) -> None:
        """Send what there is in this turn of the loop, and what comes to it meanwhile, in one write."""
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        buffers = self.connection.take_output()
        if buffers and not self._transport.is_closing():
            if sum(map(len, buffers)) <= JOIN_BYTES:
                self._transport.write(b"".join(buffers))
            else:
                self._transport.writelines(buffers)
        if self.connection.can_pump:
            self._tell(self.connection.pump())
            self.flush()

    # -- for the server

    @property
    def is_idle(self) -> bool:
        """Whether no call is open and nothing is left to send."""
        return not self._calls and not self.connection.streams

    def go_away(self) -> None:
        """Announce the end: open calls go on."""
        self.connection.go_away()
        self.flush()

    def close(self) -> None:
        """End the connection, and all calls, when what was written is sent."""
        self._cancel_calls()
        self._flush()
        self._transport.close()
        self.loop.call_later(CLOSE_S, self._transport.abort)

    # -- what comes

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            self._on[type(event)](event)

    def _request_received(self, event: events_of.RequestReceived) -> None:
        fields, stream_id = event.head.fields, event.stream_id
        if fields[b":method"] != b"POST":
            self.connection.end_stream(stream_id, http_error(405))
            return
        if not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            self.connection.end_stream(stream_id, http_error(415))
            return
        path = fields[b":path"]
        method = self._methods.get(path)
        if method is None:
            text = f"there is no method {path.decode('utf-8', 'replace')}"
            self.connection.end_stream(stream_id, trailers(StatusCode.UNIMPLEMENTED, text, alone=True))
            return
        call = self._calls[stream_id] = Call(self, stream_id, event.head, method, event.ended)
        call.start()

    def _data_received(self, event: events_of.DataReceived) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            call.feed(event.data, event.ended)

    def _stream_ended(self, event: events_of.StreamEnded) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            call.feed(b"", True)

    def _stream_reset(self, event: events_of.StreamReset) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            call.cancel()

    def _data_written(self, event: events_of.DataWritten) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            call.content_written()

    def _connection_ended(self, event: events_of.ConnectionEnded) -> None:
        self._owner.complain(f"a client's connection was closed: {event.reason} ({event.code.name})")
        self.close()

    def _cancel_calls(self) -> None:
        for call in list(self._calls.values()):
            call.cancel()

    # -- keepalive

    def _ping_answered(self, _: events_of.PingAnswered) -> None:
        if self._alarm is not None and self._asked is not None:
            self._asked = None
            self._alarm.cancel()
            self._alarm = self.loop.call_later(KEEPALIVE_INTERVAL_S, self._look_after)

    def _look_after(self) -> None:
        """Ask a client that is silent whether it is there, and close if it does not say so in time."""
        now = self.loop.time()
        if not self.connection.preface_received and now - self._began >= PREFACE_S:
            self._transport.abort()
            return
        if self._asked is None or self._heard > self._asked:
            left = self._heard + KEEPALIVE_INTERVAL_S - now
            self._asked = None
            if left <= 0:
                left, self._asked = KEEPALIVE_TIMEOUT_S, now
                self.connection.ping()
                self.flush()
        else:
            late = now - self._asked - KEEPALIVE_TIMEOUT_S
            if late >= DOUBT_S:
                self._transport.abort()
                return
            left = DOUBT_S
        self._alarm = self.loop.call_later(max(left, 0.001), self._look_after)
