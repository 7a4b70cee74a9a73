"""One ext_proc call: Envoy's messages go to the state machine, and its replies back."""

from __future__ import annotations

import asyncio
import logging
from asyncio import TimerHandle
from collections.abc import Mapping
from typing import Protocol

from msgspec.structs import replace

from ...admission.body_memory import BodyAllocation
from ...request import headers as names
from ...request.errors import Reject
from ...router import PDRouter
from ...routing.answer_watch import AnswerWatch
from ...routing.forward import Forward
from ...rpc import Call, CallError, StatusCode
from ..limits import MAX_MESSAGE_BYTES
from .messages import decode, encode, encode_begin, encode_part, encode_streamed, pass_on
from .stream import (
    Answer,
    AnswerBegins,
    Continue,
    Message,
    PassOn,
    Phase,
    Reply,
    Route,
    State,
    Stream,
    StreamedAnswer,
    StreamError,
    Wait,
)

log = logging.getLogger(__name__)

GIVE_WAY_BYTES = 1 << 20
"""To copy a message of this size takes up to a millisecond."""

UNANNOUNCED_BYTES = 64 << 10
"""What a message may have beyond the body that was announced, before room for it is asked for."""


class Owner(Protocol):
    """The service that an exchange belongs to."""

    router: PDRouter

    def speaks_buffered(self, version: str | None) -> None:
        """Learn which version of ``envoy/envoy.yaml`` an Envoy has that is to be as that says."""
        ...

    def takes_list(self, connection: object) -> bool:
        """Whether the gateway at a connection takes a list of destinations."""
        ...

    def tells_answers(self, connection: object) -> bool:
        """Whether the gateway at a connection has told of an answer."""
        ...

    def told_answer(self, connection: object, served: bool) -> None:
        """Learn that the gateway at a connection tells of an answer, and perhaps who has ``served`` it."""
        ...

    def ended(self) -> None:
        """Learn that one is over, once for each."""
        ...

    def complain(self, error: Exception) -> None:
        """Learn of an Envoy that sends what is wrong."""
        ...


class Exchange:
    """Serves one call, message by message: the next is read when the one before is answered.

    Envoy cancels the call when a client leaves, also during a prefill. The stream lasts as long as the
    answer: nothing that is as large as the body may be kept after it was sent.
    """

    __slots__ = (
        "_began",
        "_call",
        "_early",
        "_ended",
        "_hold",
        "_owner",
        "_router",
        "_running",
        "_stream",
        "_task",
        "_timer",
        "_watch",
    )

    def __init__(self, call: Call, owner: Owner) -> None:
        self._call = call
        self._owner = owner
        self._router = owner.router
        self._stream = Stream()
        self._hold = BodyAllocation(self._router.body_memory)
        self._task: asyncio.Task[None] | None = None
        self._running = False
        """Whether the task has begun, and has not ended."""
        self._ended = False
        self._began = 0.0
        """When a gateway's request came."""
        self._watch: AnswerWatch | None = None
        """Of a gateway's answer, when the request was sent."""
        self._early: bytes | bytearray | None = None
        """A gateway's message that has come while the one before was being answered."""
        self._timer: TimerHandle | None = None
        call.next()

    # -- what the call tells

    def accepts(self, size: int) -> bool:
        """Ask for the memory of a body that was not announced, and answer in its place if there is none."""
        stream, largest = self._stream, self._router.body_memory.largest
        size += stream.received
        if size <= largest + MAX_MESSAGE_BYTES or not (stream.streamed and stream.state is State.AWAIT_BODY):
            size = min(size, largest)
        if size - UNANNOUNCED_BYTES <= self._hold.size or self._hold.resize(size):
            return True
        if stream.state in (State.AWAIT_HEADERS, State.AWAIT_BODY):
            self._answer(stream.refused(self._router.no_memory(size, stream.headers)))
        return False

    def message(self, data: bytes | bytearray) -> None:
        """Take a message of Envoy's."""
        watch = self._watch
        if watch is not None and (passed := pass_on(data)) is not None:
            before, part, size, last = passed
            if watch.awaits_body:
                watch.body_begun(part, self._router.clock())
            watch.bytes += size
            if last:
                self._stream.complete = True
            self._call.write(before, part)
            return
        if self._stream.state is State.ROUTED:
            self._early = data
            return
        if len(data) > GIVE_WAY_BYTES:
            asyncio.get_running_loop().call_soon(self._receive_large, data)
            return
        try:
            self._receive(decode(data))
        except (StreamError, CallError) as error:
            self._refuse(error)

    def half_closed(self) -> None:
        """Envoy has no more to tell: the response has ended, or its client has left."""
        if self._stream.forward is not None:
            self._stream.forward.ended_by_envoy = True
        self._call.finish()
        self._end()

    def written(self) -> None:
        """Envoy has the answer, or will have it.

        That the call is cancelled later says nothing of that: Envoy may have sent the request on, with a
        hand-off that its D is using. What becomes of it only the access log tells: also of a client that left
        before Envoy has read the answer. Without a word from there it is left to P's lease.
        """
        stream = self._stream
        if stream.state is State.ROUTED:
            stream.sent()
            if stream.forward is None or stream.forward.beside is None:
                self._hold.release()
            else:  # P is still being sent it
                stream.forward.beside.when_done(self._hold.release)
            if stream.streamed and stream.forward is not None:
                self._watch_answer(stream.forward)
        if stream.state is State.CLOSED:
            self._call.finish()
            self._end()
        elif self._early is not None:
            early, self._early = self._early, None
            self.message(early)
        else:
            self._call.next()

    def cancelled(self) -> None:
        """The call is over: the client has left, or Envoy."""
        self._end()

    # -- messages

    def _receive(self, message: Message) -> None:
        """Answer a message, or have its request routed."""
        if message.phase is Phase.REQUEST_HEADERS:
            message = self._in_its_mode(message)
        action, size = self._stream.receive(message), message.body_size
        if self._stream.streamed:
            self._receive_streamed(action, message)
        elif size != self._hold.size and size and not self._hold.resize(size):
            self._answer(self._stream.refused(self._router.no_memory(size, self._stream.headers)))
        elif isinstance(action, Route):
            self._start(action)
        elif not isinstance(action, Wait):
            self._answer(action)

    def _in_its_mode(self, message: Message) -> Message:
        """Return the first message with the mode of those that follow.

        Whoever does not tell it is our own Envoy, which tells its version, or else a gateway.
        """
        version = self._call.metadata(names.ENVOY_CONFIG)
        if message.streamed is None:
            message = replace(message, streamed=version is None)
        if message.streamed:
            self._began = self._router.clock()
        else:
            self._owner.speaks_buffered(version)
        return message

    def _start(self, action: Route) -> None:
        if self._router.tracer is not None:
            action.headers = self._with_envoys_span(action.headers)
        self._task = asyncio.get_running_loop().create_task(self._route(action))

    def _with_envoys_span(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return a request's headers with Envoy's own span in place of its client's, if Envoy traces."""
        told = {name: self._call.metadata(name) for name in (names.TRACEPARENT, names.TRACESTATE)}
        return {**headers, **{name: value for name, value in told.items() if value}}

    def _answer(self, reply: Reply) -> None:
        if isinstance(reply, (Continue, Answer)):
            self._call.write(*encode(reply))
        elif isinstance(reply, StreamedAnswer):
            reply.forward.for_gateway(self._owner.takes_list(self._call.connection))
            self._call.write_all(encode_streamed(reply))
        elif isinstance(reply, AnswerBegins):
            self._begin_answer(reply)
        else:
            self._pass_on(reply)

    def _refuse(self, error: StreamError | CallError) -> None:
        self._owner.complain(error)
        code = error.code if isinstance(error, CallError) else StatusCode.INVALID_ARGUMENT
        self._call.finish(code, str(error))
        self._end()

    # -- a gateway's

    def _receive_streamed(self, action: Reply | Route | Wait, message: Message) -> None:
        """Answer a message of a gateway's, or wait for the next."""
        stream = self._stream
        if size := self._too_large(message):
            self._answer(stream.refused(self._router.no_memory(size, stream.headers)))
        elif stream.state is State.AWAIT_BODY and stream.asks_for_websocket:
            self._answer(stream.refused(self._router.no_websocket(stream.headers)))
        elif isinstance(action, Route):
            self._start(action)
            self._call.next()  # its client may leave meanwhile
        elif isinstance(action, Wait):
            self._call.next()
        else:
            self._answer(action)

    def _too_large(self, message: Message) -> int:
        """Return the size of the request's body if there is no room for it; else 0."""
        stream = self._stream
        if message.phase is Phase.REQUEST_HEADERS:
            announced = message.body_size
            return announced if announced > self._router.body_memory.largest else 0
        if stream.state not in (State.AWAIT_BODY, State.ROUTING):
            self._hold.release()  # of a part of the answer
            return 0
        if self._hold.resize(stream.received):
            return 0
        return stream.received

    def _watch_answer(self, forward: Forward) -> None:
        """Learn from now on what becomes of a request that its gateway sends on."""
        self._watch = self._router.watch(forward, self._began)
        self._watch.sent(self._router.clock(), self._tells_answers)
        if forward.first_byte_timeout is not None and self._tells_answers:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(forward.first_byte_timeout, self._too_late)

    @property
    def _tells_answers(self) -> bool:
        """Whether the gateway tells when an answer begins: not all do, though the protocol wants it."""
        return self._stream.answer_streamed or self._owner.tells_answers(self._call.connection)

    def _begin_answer(self, action: AnswerBegins) -> None:
        watch, head = self._watch, action.head
        self._stop_timer()
        self._owner.told_answer(self._call.connection, bool(head.served))
        if watch is None:
            self._call.write(encode_begin({}))
            return
        refused = watch.begun(head, self._router.clock())
        if refused is not None:
            self._answer(self._stream.refused(refused))
        else:
            self._call.write(encode_begin(watch.client_headers()))

    def _pass_on(self, action: PassOn) -> None:
        """Give back a part of an answer that is too long for one message, or not as Envoy writes it."""
        watch = self._watch
        if watch is not None:
            if watch.awaits_body:
                watch.body_begun(action.body, self._router.clock())
            watch.bytes += len(action.body)
        self._call.write_all(encode_part(action))

    def _too_late(self) -> None:
        """Answer in the place of a D that has not begun to in time: its hand-off may be too old by now."""
        watch, stream = self._watch, self._stream
        self._timer = None
        if watch is not None and stream.state is State.FORWARDED:
            self._answer(stream.refused(watch.late(self._router.clock())))

    def _give_up(self, answer: Reject) -> None:
        """Answer in the place of a D that waits for what will not come, or cut an answer that has begun."""
        if self._stream.state is not State.FORWARDED or self._ended:
            return
        self._stop_timer()
        if self._watch is not None:
            answer = self._watch.refused(answer, self._router.clock())
        self._answer(self._stream.refused(answer))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- what takes more than a moment

    async def _route(self, action: Route) -> None:
        self._running = True
        stream = self._stream
        try:
            routed = self._router.route(action.headers, stream.kept(action.take_body()), action.subset)
            outcome = await routed
            if isinstance(outcome, Forward) and outcome.call is not None:
                outcome.refuse = self._give_up
            self._answer(stream.routed(outcome))
        except StreamError as error:
            self._refuse(error)
        except Exception as error:
            self._failed(error)
        finally:
            self._running = False
            if self._ended:
                self._give_back()

    def _receive_large(self, data: bytes | bytearray) -> None:
        """Copy a message that others should not wait for, in a turn of the loop of its own."""
        if self._ended:
            return
        try:
            self._receive(decode(data))
        except (StreamError, CallError) as error:
            self._refuse(error)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """End the call for a bug, or a strategy of the operator's own: Envoy lets the request pass to D."""
        log.exception("a request could not be routed")
        self._call.finish(StatusCode.INTERNAL, type(error).__name__)
        self._end()

    def _end(self) -> None:
        """Have nothing work on the request any more, and then give back what it had reserved."""
        if self._ended:
            return
        self._ended = True
        task = self._task
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()  # also one that has not begun
        if self._watch is not None:
            self._stop_timer()
            told = self._call.is_connected and (self._tells_answers or self._stream.complete)
            self._watch.ended(self._stream.complete, told, self._stream.answer_streamed, self._router.clock())
        if not self._running:
            self._give_back()

    def _give_back(self) -> None:
        if self._stream.unsent is not None:
            self._router.in_flight.unused(self._stream.unsent)
        self._stream.close()
        self._hold.release()
        self._owner.ended()
