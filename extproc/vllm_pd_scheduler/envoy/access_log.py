"""Attempts at a decode instance that failed, as Envoy tells them at once by its access log service.

Envoy retries by itself. The scheduler must know which instance failed and whether the hand-off was used:
one message comes for each attempt that failed, and nothing for one that succeeded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from envoy.data.accesslog.v3.accesslog_pb2 import AccessLogType
from envoy.service.accesslog.v3 import als_pb2

from ..models import join_address
from ..request import headers as names
from ..routing.attempts import FailedAttempt, Failure, failure_of_status
from ..rpc import Method, ServerStream, StatusCode, served_by
from ..telemetry import log_lines
from .limits import MAX_MESSAGE_BYTES, BadMessage, parse

log = logging.getLogger(__name__)

SERVICE = "envoy.service.accesslog.v3.AccessLogService"

MAX_ENTRIES = 1024
"""Attempts in one message, at most. Envoy sends one, or as many as fit in 16 KiB."""

MAX_RETRY_AFTER_S = 60.0
"""An instance that wants to be left alone for longer is asked again all the same."""


class AttemptLog:
    """Serves ``envoy.service.accesslog.v3.AccessLogService`` and calls ``listener`` for each attempt."""

    def __init__(self, listener: Callable[[FailedAttempt], None]) -> None:
        self._listener = listener

    def methods(self) -> dict[str, Method]:
        """Return what a server needs to serve this, by path."""
        return {f"/{SERVICE}/StreamAccessLogs": served_by(self._stream, MAX_MESSAGE_BYTES)}

    async def _stream(self, stream: ServerStream) -> None:
        try:
            while (data := await stream.read()) is not None:
                for attempt in read_attempts(data):
                    log_lines.request_id.set(attempt.request_id)
                    self._listener(attempt)
                log_lines.request_id.set("")
        except BadMessage as error:
            log.warning("an access log stream was ended: %s", error)
            raise
        await stream.write(als_pb2.StreamAccessLogsResponse().SerializeToString())


def read_attempts(data: bytes) -> Iterator[FailedAttempt]:
    """Read a ``StreamAccessLogsMessage``; raises :exc:`~.limits.BadMessage` if it is none, or too large.

    Envoy's router writes an entry for each attempt at an instance, and its connection manager one for each
    request that a client left or that Envoy answered with an error of its own; ``envoy/envoy.yaml`` filters
    both, so that nothing comes for those that went well.
    """
    entries = parse(als_pb2.StreamAccessLogsMessage, data).http_logs.log_entry
    if len(entries) > MAX_ENTRIES:
        reason = f"a StreamAccessLogsMessage of {len(entries)} entries: at most {MAX_ENTRIES} are read"
        raise BadMessage(StatusCode.RESOURCE_EXHAUSTED, reason)
    for entry in entries:
        downstream = entry.common_properties.access_log_type == AccessLogType.DownstreamEnd
        failure = _failure_of_request(entry) if downstream else _failure_of_attempt(entry)
        if failure is None:
            continue
        headers = entry.request.request_headers
        yield FailedAttempt(
            _address(entry),
            failure,
            headers.get(names.ID),
            headers.get(names.ATTEMPT, "1") == "1",
            entry.response.response_code.value,
            _seconds(entry.response.response_headers.get("retry-after", "")),
            entry.request.request_id,
        )


_RESETS = (
    "upstream_connection_termination",
    "upstream_remote_reset",
    "upstream_protocol_error",
    "stream_idle_timeout",
)


def _failure_of_attempt(entry: Any) -> Failure | None:
    """Return how an attempt failed; ``None`` if none was made: no host was found, or Envoy refused it."""
    common, status = entry.common_properties, entry.response.response_code.value
    if not common.upstream_remote_address.socket_address.port_value:
        return None
    flags = common.response_flags
    broken = flags.upstream_request_timeout or any(getattr(flags, name) for name in _RESETS)
    if status:
        return Failure.CUT if status < 300 and broken else failure_of_status(status)
    if flags.upstream_connection_failure:
        return Failure.CONNECT
    if flags.upstream_request_timeout or flags.stream_idle_timeout:
        return Failure.TIMEOUT
    if broken:
        return Failure.RESET
    first = entry.request.request_headers.get(names.ATTEMPT, "1") == "1"
    sent = common.HasField("time_to_last_upstream_tx_byte")
    return Failure.LEFT if first or sent else None


def _failure_of_request(entry: Any) -> Failure | None:
    """Return how a request failed without an attempt that tells of it; ``None`` if one does."""
    if names.ATTEMPT not in entry.request.request_headers:
        return Failure.UNSENT
    flags, status = entry.common_properties.response_flags, entry.response.response_code.value
    if flags.stream_idle_timeout and status == 200:
        return Failure.CUT
    left = flags.downstream_connection_termination
    # One that had begun to write is alive, whoever was not there to read it.
    return Failure.ABANDONED if left and status == 200 and not entry.response.response_body_bytes else None


def _address(entry: Any) -> str:
    socket = entry.common_properties.upstream_remote_address.socket_address
    return join_address(socket.address, socket.port_value) if socket.port_value else ""


def _seconds(retry_after: str) -> float | None:
    """Return a ``Retry-After`` in seconds; a date, which no vLLM sends, counts as none."""
    return min(float(retry_after), MAX_RETRY_AFTER_S) if retry_after.isdecimal() else None
