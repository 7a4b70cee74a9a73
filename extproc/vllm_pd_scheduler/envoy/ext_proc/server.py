"""The gRPC shell around the state machine."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc

from ...admission.body_memory import BodyAllocation
from ...router import PDRouter
from ..limits import BadMessage
from .messages import SERVICE, decode, encode
from .stream import Reply, Route, State, Stream, StreamError

log = logging.getLogger(__name__)

COMPLAIN_EVERY_S = 10.0
"""An Envoy with a wrong mode sends what is wrong with each request: that is logged at most so often."""

GIVE_WAY_BYTES = 1 << 20
"""To copy a message of this size takes up to a millisecond."""


class ExtProcService:
    """Serves ``envoy.service.ext_proc.v3.ExternalProcessor``: one stream for each HTTP request."""

    def __init__(self, router: PDRouter) -> None:
        self._router = router
        self.open_streams = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._next_complaint = 0.0

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to register with a ``grpc.aio`` server."""
        return grpc.method_handlers_generic_handler(
            SERVICE, {"Process": grpc.stream_stream_rpc_method_handler(self._process)}
        )

    async def idle(self) -> None:
        """Wait until no stream is open, that is, until every response has ended."""
        await self._idle.wait()

    async def _process(self, _: object, context: Any) -> None:
        stream, hold = Stream(), BodyAllocation(self._router.body_memory)
        self.open_streams += 1
        self._idle.clear()
        try:
            while stream.state is not State.CLOSED and await self._exchange(stream, hold, context):
                pass
        except (StreamError, BadMessage) as error:
            self._complain(error)
            code = error.code if isinstance(error, BadMessage) else grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(code, str(error))
        except grpc.aio.InternalError:
            raise asyncio.CancelledError from None  # nothing can be written: it has ended
        except Exception as error:
            # A bug, or a strategy of the operator's own that raised: Envoy lets the request pass to D.
            log.exception("a request could not be routed")
            await context.abort(grpc.StatusCode.INTERNAL, type(error).__name__)
        finally:
            if stream.unsent is not None:
                self._router.in_flight.unused(stream.unsent)
            stream.close()
            hold.release()
            self.open_streams -= 1
            if not self.open_streams:
                self._idle.set()

    def _complain(self, error: Exception) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_complaint:
            self._next_complaint = now + COMPLAIN_EVERY_S
            log.warning("an ext_proc stream was ended, and Envoy lets its request pass: %s", error)

    async def _exchange(self, stream: Stream, hold: BodyAllocation, context: Any) -> bool:
        """Read a message of Envoy's and answer it; return whether there may be another.

        Envoy cancels the call when a client leaves, also during a prefill. The stream lasts as long as the
        answer: nothing that is as large as the body may be kept after this.
        """
        data = await context.read()
        if data is grpc.aio.EOF:
            return False
        await _give_way(len(data))
        message = decode(data)
        del data
        action, size = stream.receive(message), message.body_size
        del message
        reply: Reply
        if size and not hold.resize(size):
            reply = stream.refused(self._router.no_memory(size))
        elif isinstance(action, Route):
            reply = stream.routed(await self._router.route(action.headers, action.take_body()))
        else:
            reply = action
        await _give_way(size)
        data = encode(reply)
        if stream.forward is not None:
            stream.forward.sent()
        await _give_way(len(data))
        await _write(context, data, stream)
        if isinstance(action, Route):
            hold.release()
        return True


async def _write(context: Any, data: bytes, stream: Stream) -> None:
    """Write a message, and tell the stream if Envoy may have it.

    That the call was cancelled meanwhile (the client has left) does not say: Envoy can have got the answer
    and sent the request on, with a hand-off that its D is using. The write itself says: it fails unless the
    whole message went out. What becomes of a hand-off that went out only the access log tells; without a
    word from there it is left to P's lease.
    """
    if stream.state is not State.ROUTED:
        await context.write(data)
        return
    writing = asyncio.ensure_future(context.write(data))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        if writing.exception() is None:
            stream.sent()
        raise
    stream.sent()


async def _give_way(size: int) -> None:
    """Let the event loop do other things before a message of so many bytes is copied once more."""
    if size > GIVE_WAY_BYTES:
        await asyncio.sleep(0)
