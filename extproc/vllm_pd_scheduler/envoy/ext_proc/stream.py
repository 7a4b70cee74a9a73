"""One ext_proc stream as a state machine: events in, one action out. No I/O, no protobuf.

An Envoy opens a stream for each HTTP request. It sends bodies in one of two modes, which its first message
tells. In the mode that ``envoy/envoy.yaml`` sets (request body BUFFERED, response headers and body not sent,
response trailers sent) it goes::

    RequestHeaders ─▶ Continue ─▶ RequestBody ─▶ Route … routed ─▶ Answer ─▶ sent ─▶ … close
    RequestHeaders(end_of_stream) ─▶ Route … routed ─▶ Answer ─▶ sent ─▶ … close

A gateway that speaks the endpoint-picker protocol sends the body as it comes (FULL_DUPLEX_STREAMED), goes on
with what comes back in its place, and does the same with the response::

    RequestHeaders ─▶ Wait ─▶ RequestBody… ─▶ Wait… ─▶ RequestBody(end_of_stream) ─▶ Route … routed
        ─▶ Answer (headers, the body in parts, trailers) ─▶ sent
        ─▶ ResponseHeaders ─▶ AnswerBegins ─▶ ResponseBody… ─▶ PassOn… ─▶ … close

Either closes the stream when the response has ended, was aborted or failed, which is how requests in flight
are counted exactly. The state machine also answers what other modes would send.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from msgspec import Struct

from ...request.errors import Reject
from ...routing.answer_head import AnswerHead
from ...routing.forward import Forward


class Phase(Enum):
    """The message of Envoy's that an action replies to: a reply must be of the same kind."""

    REQUEST_HEADERS = auto()
    REQUEST_BODY = auto()
    REQUEST_TRAILERS = auto()
    RESPONSE_HEADERS = auto()
    RESPONSE_BODY = auto()
    RESPONSE_TRAILERS = auto()


class State(Enum):
    """Where a stream is."""

    AWAIT_HEADERS = auto()
    AWAIT_BODY = auto()
    ROUTING = auto()
    ROUTED = auto()
    """There is an outcome, and Envoy does not have it."""
    FORWARDED = auto()
    """The request is on its way to decode, or its answer on its way back."""
    CLOSED = auto()


Bytes = bytes | memoryview

SHORT_BYTES = 4096
"""A shorter part of a body is copied to the one before it."""

TOGETHER_BYTES = 1 << 16
"""Until that one has so many."""


class Message(Struct, frozen=True):
    """A message from Envoy.

    ``headers`` is set for request headers, ``head`` for those of the response, and ``body`` for a part of a
    body. The first message of a stream says how those that follow come: ``streamed`` if the request's body
    comes in parts and has to go back, ``None`` if that is not told; ``answer_streamed`` for the response's.
    ``subset`` is of which endpoints (``ip:port`` or ``ip``) the request is to go to one.
    """

    phase: Phase
    end_of_stream: bool = False
    headers: Mapping[str, str] | None = None
    body: Bytes = b""
    streamed: bool | None = False
    answer_streamed: bool = False
    subset: frozenset[str] | None = None
    head: AnswerHead | None = None

    @property
    def body_size(self) -> int:
        """Bytes of the request's body that it brings or, if it has the headers, announces."""
        announced = (self.headers or {}).get("content-length", "")
        if announced.isdecimal() and not self.end_of_stream:
            return int(announced[:20])  # more digits are too much all the same, and int() takes 4,300 at most
        return len(self.body)


class Continue(Struct, frozen=True):
    """Reply to ``phase`` that nothing changes."""

    phase: Phase


class Wait(Struct, frozen=True):
    """Reply nothing: there is more to come."""


class Route(Struct):
    """Tell the caller to route this request, and then to call :meth:`Stream.routed`."""

    headers: Mapping[str, str]
    parts: list[Bytes | bytearray] = []
    subset: frozenset[str] | None = None

    def take_body(self) -> bytes:
        """Return the body, and let go of it."""
        parts, self.parts = self.parts, []
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)


class Answer(Struct, frozen=True):
    """Reply to ``phase`` with where the request goes, or with an error in its place."""

    phase: Phase
    outcome: Forward | Reject


class StreamedAnswer(Struct, frozen=True):
    """Reply with where the request goes, with its whole body (``None``: it has none) and its trailers."""

    forward: Forward
    body: bytes | None
    trailers: bool


class AnswerBegins(Struct, frozen=True):
    """Let the response begin, and tell the client who gives it."""

    head: AnswerHead
    forward: Forward


class PassOn(Struct, frozen=True):
    """Give back a part of the response's body as it is."""

    body: Bytes
    end_of_stream: bool


Reply = Continue | Answer | StreamedAnswer | AnswerBegins | PassOn
"""What goes back to Envoy."""


class StreamError(Exception):
    """A message cannot come now, or is of no known kind. The stream ends; Envoy lets the request pass."""


class Stream:
    """The state of one stream. ``close`` must be called once, whatever happened."""

    __slots__ = (
        "_body",
        "_parts",
        "_phase",
        "_subset",
        "_trailers",
        "answer_streamed",
        "answered",
        "complete",
        "forward",
        "headers",
        "received",
        "state",
        "streamed",
    )

    def __init__(self) -> None:
        self.state = State.AWAIT_HEADERS
        self.forward: Forward | None = None
        self.headers: Mapping[str, str] = {}
        self.streamed = False
        """Whether the body has to go back."""
        self.answer_streamed = False
        """Whether the response's body has to."""
        self.received = 0
        """Bytes of the request's body that have come and are here."""
        self.answered = False
        """Whether the response's headers have come."""
        self.complete = False
        """Whether all of the response has."""
        self._phase = Phase.REQUEST_HEADERS
        self._parts: list[Bytes | bytearray] = []
        self._body: bytes | None = None
        self._subset: frozenset[str] | None = None
        self._trailers = False

    @property
    def asks_for_websocket(self) -> bool:
        """Whether the body will be a WebSocket's, which does not end before the answer does."""
        return self.headers.get("upgrade", "").lower() == "websocket"

    def receive(self, message: Message) -> Reply | Route | Wait:
        """Return what a message of Envoy's asks for; raises :exc:`StreamError` if it cannot come now."""
        state, phase = self.state, message.phase
        if state is State.AWAIT_HEADERS and phase is Phase.REQUEST_HEADERS:
            return self._begin(message)
        if state is State.AWAIT_BODY and phase is Phase.REQUEST_BODY:
            return self._take(message)
        if self.streamed:
            return self._receive_streamed(message)
        if state is State.FORWARDED and phase in _AFTER_ROUTING:
            return Continue(phase)
        raise StreamError(f"{phase.name} cannot come in state {state.name}")

    def _begin(self, message: Message) -> Reply | Route | Wait:
        self.headers, self._subset = message.headers or {}, message.subset
        self.streamed, self.answer_streamed = bool(message.streamed), message.answer_streamed
        if message.end_of_stream:
            return self._route()
        self.state = State.AWAIT_BODY
        return Wait() if self.streamed else Continue(message.phase)

    def _take(self, message: Message) -> Route | Wait:
        self._phase = message.phase
        self.received += len(message.body)
        if message.body:
            self._keep(message.body)
        return Wait() if self.streamed and not message.end_of_stream else self._route()

    def _keep(self, part: Bytes) -> None:
        """Keep a part of the body: short ones together, since each object takes more than its bytes."""
        parts = self._parts
        last = parts[-1] if parts else part
        if not parts or len(part) >= SHORT_BYTES or len(last) >= TOGETHER_BYTES:
            parts.append(part)
        elif isinstance(last, bytearray):
            last += part
        else:
            parts[-1] = bytearray(last) + part

    def _receive_streamed(self, message: Message) -> Reply | Route | Wait:
        state, phase = self.state, message.phase
        if state is State.AWAIT_BODY and phase is Phase.REQUEST_TRAILERS:
            self._phase, self._trailers = phase, True
            return self._route()
        if phase in _REQUEST_ENDS and state in _AFTER_BODY:
            # Envoy tells the end of a large body twice at times, and other gateways after its trailers.
            return Wait()
        if state is not State.FORWARDED or phase not in _AFTER_ROUTING or self.forward is None:
            raise StreamError(f"{phase.name} cannot come in state {state.name}")
        self.complete = self.complete or message.end_of_stream or phase is Phase.RESPONSE_TRAILERS
        if phase is Phase.RESPONSE_HEADERS and message.head is not None:
            self.answered = True
            return AnswerBegins(message.head, self.forward)
        if phase is Phase.RESPONSE_BODY:
            return PassOn(message.body, message.end_of_stream)
        return Continue(phase)

    def refused(self, answer: Reject) -> Answer:
        """Answer the request in place of the action for the message that has just come."""
        self.state = State.CLOSED
        self._parts, self._body = [], None
        return Answer(self._phase, answer)

    def kept(self, body: bytes) -> bytes:
        """Return the request's whole body; keep it too if it has to go back."""
        if self.streamed and self._phase is not Phase.REQUEST_HEADERS:
            self._body = body
        return body

    def routed(self, outcome: Forward | Reject) -> Answer | StreamedAnswer:
        """Return the answer for the outcome of a :class:`Route` action."""
        if self.state is not State.ROUTING:
            if isinstance(outcome, Forward):
                outcome.release()
            raise StreamError(f"nothing is being routed in state {self.state.name}")
        if isinstance(outcome, Reject):
            return self.refused(outcome)
        self.forward = outcome
        self.state = State.ROUTED
        if not self.streamed:
            return Answer(self._phase, outcome)
        changed, body = outcome.body, self._body
        return StreamedAnswer(outcome, body if changed is None else changed, self._trailers)

    def sent(self) -> None:
        """Record that Envoy may have the outcome, and let go of its body."""
        if self.state is State.ROUTED and self.forward is not None:
            self.state = State.FORWARDED
            self._body, self.received = None, 0
            self.forward.sent()

    @property
    def unsent(self) -> Forward | None:
        """The forward that Envoy does not have, if there is one: nobody will use its hand-off."""
        return self.forward if self.state is State.ROUTED else None

    def close(self) -> None:
        """End the stream: give back what the request had reserved."""
        self.state = State.CLOSED
        self._parts, self._body = [], None
        if self.forward is not None:
            self.forward.release()

    def _route(self) -> Route:
        self.state = State.ROUTING
        parts, self._parts = self._parts, []
        return Route(self.headers, parts, self._subset)


_AFTER_ROUTING = frozenset(
    {Phase.REQUEST_TRAILERS, Phase.RESPONSE_HEADERS, Phase.RESPONSE_BODY, Phase.RESPONSE_TRAILERS}
)
_REQUEST_ENDS = frozenset({Phase.REQUEST_BODY, Phase.REQUEST_TRAILERS})
_AFTER_BODY = frozenset({State.ROUTING, State.ROUTED, State.FORWARDED})
