"""One ext_proc stream as a state machine: events in, one action out. No I/O, no protobuf.

Envoy opens a stream for each HTTP request. In the mode that ``envoy/envoy.yaml`` sets (request body
BUFFERED, response headers and body not sent, response trailers sent) it goes::

    RequestHeaders ─▶ Continue ─▶ RequestBody ─▶ Route … routed ─▶ Answer ─▶ sent ─▶ … close
    RequestHeaders(end_of_stream) ─▶ Route … routed ─▶ Answer ─▶ sent ─▶ … close

and Envoy closes the stream when the response has ended, was aborted or failed, which is how requests in
flight are counted exactly. The state machine also answers what other modes would send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from ...request.errors import Reject
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


@dataclass(frozen=True, slots=True)
class Message:
    """A message from Envoy; ``headers`` is set for request headers, ``body`` for the request's body."""

    phase: Phase
    end_of_stream: bool = False
    headers: Mapping[str, str] | None = None
    body: bytes = b""

    @property
    def body_size(self) -> int:
        """Bytes of the request's body that it brings or, if it has the headers, announces."""
        announced = (self.headers or {}).get("content-length", "")
        if announced.isdecimal() and not self.end_of_stream:
            return int(announced[:20])  # more digits are too much all the same, and int() takes 4,300 at most
        return len(self.body)


@dataclass(frozen=True, slots=True)
class Continue:
    """Reply to ``phase`` that nothing changes."""

    phase: Phase


@dataclass(slots=True)
class Route:
    """Tell the caller to route this request, and then to call :meth:`Stream.routed`."""

    headers: Mapping[str, str]
    body: bytes

    def take_body(self) -> bytes:
        """Return the body, and let go of it."""
        body, self.body = self.body, b""
        return body


@dataclass(frozen=True, slots=True)
class Answer:
    """Reply to ``phase`` with where the request goes, or with an error in its place."""

    phase: Phase
    outcome: Forward | Reject


Reply = Continue | Answer
"""What goes back to Envoy."""


class StreamError(Exception):
    """A message cannot come now, or is of no known kind. The stream ends; Envoy lets the request pass."""


class Stream:
    """The state of one stream. ``close`` must be called once, whatever happened."""

    __slots__ = ("_phase", "forward", "headers", "state")

    def __init__(self) -> None:
        self.state = State.AWAIT_HEADERS
        self.forward: Forward | None = None
        self.headers: Mapping[str, str] = {}
        self._phase = Phase.REQUEST_HEADERS

    def receive(self, message: Message) -> Continue | Route:
        """Return what a message of Envoy's asks for; raises :exc:`StreamError` if it cannot come now."""
        state, phase = self.state, message.phase
        self._phase = phase
        if state is State.AWAIT_HEADERS and phase is Phase.REQUEST_HEADERS:
            self.headers = message.headers or {}
            if message.end_of_stream:
                return self._route(b"")
            self.state = State.AWAIT_BODY
            return Continue(phase)
        if state is State.AWAIT_BODY and phase is Phase.REQUEST_BODY:
            return self._route(message.body)
        if state is State.FORWARDED and phase in _AFTER_ROUTING:
            return Continue(phase)
        raise StreamError(f"{phase.name} cannot come in state {state.name}")

    def refused(self, answer: Reject) -> Answer:
        """Answer the request in place of the action for the message that has just come."""
        self.state = State.CLOSED
        return Answer(self._phase, answer)

    def routed(self, outcome: Forward | Reject) -> Answer:
        """Return the answer for the outcome of a :class:`Route` action."""
        if self.state is not State.ROUTING:
            if isinstance(outcome, Forward):
                outcome.release()
            raise StreamError(f"nothing is being routed in state {self.state.name}")
        if isinstance(outcome, Forward):
            self.forward = outcome
            self.state = State.ROUTED
        else:
            self.state = State.CLOSED
        return Answer(self._phase, outcome)

    def sent(self) -> None:
        """Record that Envoy may have the outcome, and let go of its body."""
        if self.state is State.ROUTED and self.forward is not None:
            self.state = State.FORWARDED
            self.forward.sent()

    @property
    def unsent(self) -> Forward | None:
        """The forward that Envoy does not have, if there is one: nobody will use its hand-off."""
        return self.forward if self.state is State.ROUTED else None

    def close(self) -> None:
        """End the stream: give back what the request had reserved."""
        self.state = State.CLOSED
        if self.forward is not None:
            self.forward.release()

    def _route(self, body: bytes) -> Route:
        self.state = State.ROUTING
        return Route(self.headers, body)


_AFTER_ROUTING = frozenset(
    {Phase.REQUEST_TRAILERS, Phase.RESPONSE_HEADERS, Phase.RESPONSE_BODY, Phase.RESPONSE_TRAILERS}
)
