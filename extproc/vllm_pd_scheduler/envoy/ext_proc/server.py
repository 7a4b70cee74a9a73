"""The gRPC shell around the state machine."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc

from ...admission.body_memory import HeldBody
from ...router import PDRouter
from .messages import SERVICE, decode, encode
from .stream import Reply, Route, State, Stream, StreamError

log = logging.getLogger(__name__)

GIVE_WAY_BYTES = 1 << 20
"""To copy a message of this size takes up to a millisecond."""


class ExtProcService:
    """Serves ``envoy.service.ext_proc.v3.ExternalProcessor``: one stream for each HTTP request."""

    def __init__(self, router: PDRouter) -> None:
        self._router = router
        self.open_streams = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to register with a ``grpc.aio`` server."""
        return grpc.method_handlers_generic_handler(
            SERVICE, {"Process": grpc.stream_stream_rpc_method_handler(self._process)}
        )

    async def idle(self) -> None:
        """Wait until no stream is open, that is, until every response has ended."""
        await self._idle.wait()

    async def _process(self, _: object, context: Any) -> None:
        stream, hold = Stream(), HeldBody(self._router.body_memory)
        self.open_streams += 1
        self._idle.clear()
        try:
            while stream.state is not State.CLOSED and await self._exchange(stream, hold, context):
                pass
        except StreamError as error:
            log.warning("ext_proc stream ended: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as error:
            # A bug, or a strategy of the operator's own that raised: Envoy lets the request pass to D.
            log.exception("a request could not be routed")
            await context.abort(grpc.StatusCode.INTERNAL, type(error).__name__)
        finally:
            stream.close()
            hold.release()
            self.open_streams -= 1
            if not self.open_streams:
                self._idle.set()

    async def _exchange(self, stream: Stream, hold: HeldBody, context: Any) -> bool:
        """Take a message of Envoy's and answer it; ``False`` if there are no more.

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
        try:
            await _give_way(size)
            data = encode(reply)
            if stream.forward is not None:
                stream.forward.body = None
            await _give_way(len(data))
            await context.write(data)
        except asyncio.CancelledError:
            if isinstance(action, Route) and stream.forward is not None:
                self._router.in_flight.unused(stream.forward)  # the client left: Envoy does not take it
            raise
        if isinstance(action, Route):
            stream.sent()
            hold.release()
        return True


async def _give_way(size: int) -> None:
    """Let the event loop do other things before a message of so many bytes is copied once more."""
    if size > GIVE_WAY_BYTES:
        await asyncio.sleep(0)
