"""Attempts at a decode instance that failed, as Envoy tells them at once by its access log service.

Envoy retries by itself. The scheduler must know which instance failed and whether the hand-off was used:
one message comes for each attempt that failed, and nothing for one that succeeded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from envoy.service.accesslog.v3 import als_pb2

from ..models import join_address
from ..request import headers as names
from ..routing.attempts import FailedAttempt, Failure
from .limits import BadMessage, parse

log = logging.getLogger(__name__)

SERVICE = "envoy.service.accesslog.v3.AccessLogService"

MAX_ENTRIES = 1024
"""Attempts in one message, at most. Envoy sends one, or as many as fit in 16 KiB."""

SETTLE_S = 1.0
"""How long after a client has left its D gets to fetch or to drop the hand-off, before it is told of."""


class AttemptLog:
    """Serves ``envoy.service.accesslog.v3.AccessLogService`` and calls ``listener`` for each attempt."""

    def __init__(self, listener: Callable[[FailedAttempt], None]) -> None:
        self._listener = listener

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to register with a ``grpc.aio`` server."""
        return grpc.method_handlers_generic_handler(
            SERVICE, {"StreamAccessLogs": grpc.stream_unary_rpc_method_handler(self._stream)}
        )

    async def _stream(self, messages: Any, context: Any) -> bytes:
        try:
            async for data in messages:
                for attempt in read_attempts(data):
                    self._tell(attempt)
        except BadMessage as error:
            log.warning("an access log stream was ended: %s", error)
            await error.end(context)
        return bytes(als_pb2.StreamAccessLogsResponse().SerializeToString())

    def _tell(self, attempt: FailedAttempt) -> None:
        if attempt.failure is Failure.LEFT:
            asyncio.get_running_loop().call_later(SETTLE_S, self._listener, attempt)
        else:
            self._listener(attempt)


def read_attempts(data: bytes) -> Iterator[FailedAttempt]:
    """Read a ``StreamAccessLogsMessage``; raises :exc:`~.limits.BadMessage` if it is none, or too large."""
    entries = parse(als_pb2.StreamAccessLogsMessage, data).http_logs.log_entry
    if len(entries) > MAX_ENTRIES:
        reason = f"a StreamAccessLogsMessage of {len(entries)} entries: at most {MAX_ENTRIES} are read"
        raise BadMessage(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
    for entry in entries:
        common, headers = entry.common_properties, entry.request.request_headers
        socket = common.upstream_remote_address.socket_address
        if not socket.port_value:
            continue  # no host was found: nobody's fault
        status = entry.response.response_code.value
        yield FailedAttempt(
            join_address(socket.address, socket.port_value),
            _failure(common.response_flags, status),
            headers.get(names.ID),
            headers.get(names.ATTEMPT, "1") == "1",
        )


_RESETS = ("upstream_connection_termination", "upstream_remote_reset", "upstream_protocol_error")


def _failure(flags: Any, status: int) -> Failure:
    if 0 < status < 500:
        return Failure.CUT
    if flags.upstream_connection_failure:
        return Failure.CONNECT
    if flags.upstream_request_timeout:
        return Failure.TIMEOUT
    if not status and not any(getattr(flags, name) for name in _RESETS):
        return Failure.LEFT
    return Failure.STATUS if status else Failure.RESET
