"""The gRPC shell around the state machine."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc

from ..router import PDRouter
from .messages import SERVICE, decode, encode
from .stream import Reply, Route, State, Stream, StreamError

log = logging.getLogger(__name__)


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
        stream = Stream()
        self.open_streams += 1
        self._idle.clear()
        try:
            await self._converse(stream, context)
        except StreamError as error:
            log.warning("ext_proc stream ended: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as error:
            # A bug, or a strategy of the operator's own that raised: Envoy lets the request pass to D.
            log.exception("a request could not be routed")
            await context.abort(grpc.StatusCode.INTERNAL, type(error).__name__)
        finally:
            stream.close()
            self.open_streams -= 1
            if not self.open_streams:
                self._idle.set()

    async def _converse(self, stream: Stream, context: Any) -> None:
        """Answer message by message. Envoy cancels the call when a client leaves, also during a prefill."""
        while (data := await context.read()) is not grpc.aio.EOF:
            action = stream.receive(decode(data))
            if isinstance(action, Route):
                reply: Reply = stream.routed(await self._router.route(action.headers, action.body))
            else:
                reply = action
            try:
                await context.write(encode(reply))
            except asyncio.CancelledError:
                if stream.forward is not None:  # the client left: Envoy does not take this answer
                    self._router.handoff_unused(stream.forward)
                raise
            if stream.state is State.CLOSED:
                return
