"""One ext_proc call: Envoy's messages go to the state machine, and its replies back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

from ...admission.body_memory import BodyAllocation
from ...request import headers as names
from ...router import PDRouter
from ...rpc import Call, CallError, StatusCode
from .messages import decode, encode
from .stream import Message, Reply, Route, State, Stream, StreamError

log = logging.getLogger(__name__)

GIVE_WAY_BYTES = 1 << 20
"""To copy a message of this size takes up to a millisecond."""

UNANNOUNCED_BYTES = 64 << 10
"""What a message may have beyond the body that was announced, before room for it is asked for."""


class Owner(Protocol):
    """The service that an exchange belongs to."""

    router: PDRouter

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

    __slots__ = ("_call", "_ended", "_hold", "_owner", "_router", "_running", "_stream", "_task")

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
        call.next()

    # -- what the call tells

    def accepts(self, size: int) -> bool:
        """Ask for the memory of a body that was not announced, and answer in its place if there is none."""
        size = min(size, self._router.body_memory.largest)
        if size - UNANNOUNCED_BYTES <= self._hold.size or self._hold.resize(size):
            return True
        self._answer(self._stream.refused(self._router.no_memory(size, self._stream.headers)))
        return False

    def message(self, data: bytes | bytearray) -> None:
        """Take a message of Envoy's."""
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
            self._hold.release()
        if stream.state is State.CLOSED:
            self._call.finish()
            self._end()
        else:
            self._call.next()

    def cancelled(self) -> None:
        """The call is over: the client has left, or Envoy."""
        if self._task is not None:
            self._task.cancel()
        self._end()

    # -- messages

    def _receive(self, message: Message) -> None:
        """Answer a message, or have its request routed."""
        action, size = self._stream.receive(message), message.body_size
        if size and not self._hold.resize(size):
            self._answer(self._stream.refused(self._router.no_memory(size, self._stream.headers)))
        elif isinstance(action, Route):
            if self._router.tracer is not None:
                action.headers = self._with_envoys_span(action.headers)
            self._task = asyncio.get_running_loop().create_task(self._route(action))
        else:
            self._answer(action)

    def _with_envoys_span(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return a request's headers with Envoy's own span in place of its client's, if Envoy traces."""
        told = {name: self._call.metadata(name) for name in (names.TRACEPARENT, names.TRACESTATE)}
        return {**headers, **{name: value for name, value in told.items() if value}}

    def _answer(self, reply: Reply) -> None:
        self._call.write(*encode(reply))

    def _refuse(self, error: StreamError | CallError) -> None:
        self._owner.complain(error)
        code = error.code if isinstance(error, CallError) else StatusCode.INVALID_ARGUMENT
        self._call.finish(code, str(error))
        self._end()

    # -- what takes more than a moment

    async def _route(self, action: Route) -> None:
        self._running = True
        try:
            self._answer(self._stream.routed(await self._router.route(action.headers, action.take_body())))
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
        """Give back what the request had reserved, when nothing works on it any more."""
        if self._ended:
            return
        self._ended = True
        if not self._running:
            self._give_back()

    def _give_back(self) -> None:
        if self._stream.unsent is not None:
            self._router.in_flight.unused(self._stream.unsent)
        self._stream.close()
        self._hold.release()
        self._owner.ended()
