"""What became of requests at decode, as Envoy tells it by its access log service.

Envoy has two logs for the scheduler. ``reports`` tells of attempts that failed, at once: Envoy retries by
itself, and the scheduler must know which instance failed and whether the hand-off was used. Nothing comes
there for an attempt that succeeded. ``results`` tells how each request has ended and how long it took, many
in one message, up to a second later: nothing is decided by that.

Envoy keeps the streams of its logs open where they are, and opens one at the nearest scheduler when it has
something to tell. So those that say nothing are ended. If the nearest scheduler was away and is back, Envoy
asks it, and its logs may still come to another one: who gets an entry about a request that it does not have
ends the streams of that connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from envoy.data.accesslog.v3.accesslog_pb2 import AccessLogType
from envoy.service.accesslog.v3 import als_pb2

from ..models import join_address
from ..request import headers as names
from ..routing.attempts import FailedAttempt, Failure, failure_of_status
from ..routing.result import Result
from ..rpc import Method, ServerStream, StatusCode, served_by
from ..telemetry import Ending, log_lines
from .limits import MAX_MESSAGE_BYTES, BadMessage, parse

log = logging.getLogger(__name__)

SERVICE = "envoy.service.accesslog.v3.AccessLogService"

RESULTS = "results"
"""Name of the log of results. What has another one, or none, tells of failed attempts."""

TTFT = "ttft"
"""The tag of an entry that has the microseconds to the first byte of the answer's body."""

MAX_ENTRIES = 1024
"""Entries in one message, at most. Envoy sends one, or as many as fit in 16 KiB."""

MAX_RETRY_AFTER_S = 60.0
"""An instance that wants to be left alone for longer is asked again all the same."""

STREAM_S = 1.0
"""How long a stream is kept at least. Entries about requests from before this scheduler's restart look like
those of another one, and come here again when their stream is opened anew."""

IDLE_S = 5.0
"""How long one is kept that says nothing."""


class AccessLog:
    """Serves ``envoy.service.accesslog.v3.AccessLogService``.

    ``failed`` is called for each attempt that has failed, and ``ended`` for each request that has ended;
    ``is_for_us`` says of a request's id whether no other scheduler can have it.
    """

    def __init__(
        self,
        failed: Callable[[FailedAttempt], None],
        ended: Callable[[Result], None],
        is_for_us: Callable[[str], bool],
    ) -> None:
        self._failed = failed
        self._ended = ended
        self._is_for_us = is_for_us
        self._open: dict[object, list[_Kept]] = {}
        """The streams of each connection."""

    def methods(self) -> dict[str, Method]:
        """Return what a server needs to serve this, by path."""
        return {f"/{SERVICE}/StreamAccessLogs": served_by(self._stream, MAX_MESSAGE_BYTES)}

    async def _stream(self, stream: ServerStream) -> None:
        kept = _Kept(asyncio.get_running_loop().time())
        beside = self._open.setdefault(stream.connection, [])
        beside.append(kept)
        try:
            async with kept.end:
                await self._read(stream, kept)
        except TimeoutError:
            log.debug("an access log stream is ended, for Envoy to open it at the nearest scheduler")
        except BadMessage as error:
            log.warning("an access log stream was ended: %s", error)
            raise
        finally:
            beside.remove(kept)
            if not beside:
                self._open.pop(stream.connection, None)
        await stream.write(als_pb2.StreamAccessLogsResponse().SerializeToString())

    async def _read(self, stream: ServerStream, kept: _Kept) -> None:
        results = False
        while (data := await stream.read()) is not None:
            kept.heard()
            message = read_message(data)
            results = results or message.identifier.log_name == RESULTS  # the first message has it
            about = self._read_results(message) if results else self._read_attempts(message)
            if not all(map(self._is_for_us, about)):
                for each in self._open[stream.connection]:
                    each.end_soon()

    def _read_attempts(self, message: als_pb2.StreamAccessLogsMessage) -> list[str]:
        """Take the entries; return the ids of their requests."""
        about = []
        for entry in message.http_logs.log_entry:
            if (attempt := read_attempt(entry)) is not None:
                log_lines.request_id.set(attempt.request_id)
                self._failed(attempt)
                if attempt.request:
                    about.append(attempt.request)
        log_lines.request_id.set("")
        return about

    def _read_results(self, message: als_pb2.StreamAccessLogsMessage) -> list[str]:
        """Take the entries; return the ids of their requests."""
        about = []
        for entry in message.http_logs.log_entry:
            if (result := read_result(entry)) is not None:
                self._ended(result)
                about.append(result.request)
        return about


class _Kept:
    """How long a stream is kept that was opened at a time of the event loop's clock."""

    def __init__(self, opened: float) -> None:
        self.end = asyncio.timeout_at(opened + IDLE_S)
        self._opened = opened
        self._ends = False

    def heard(self) -> None:
        """Note that something has come."""
        if not self._ends:
            self.end.reschedule(asyncio.get_running_loop().time() + IDLE_S)

    def end_soon(self) -> None:
        """End the stream as soon as may be."""
        if not self._ends:
            self._ends = True
            self.end.reschedule(max(self._opened + STREAM_S, asyncio.get_running_loop().time()))


def read_message(data: bytes) -> als_pb2.StreamAccessLogsMessage:
    """Read a ``StreamAccessLogsMessage``; raises :exc:`~.limits.BadMessage` if it is none, or too large."""
    message = parse(als_pb2.StreamAccessLogsMessage, data)
    if len(message.http_logs.log_entry) > MAX_ENTRIES:
        count = len(message.http_logs.log_entry)
        reason = f"a StreamAccessLogsMessage of {count} entries: at most {MAX_ENTRIES} are read"
        raise BadMessage(StatusCode.RESOURCE_EXHAUSTED, reason)
    return message


def read_attempt(entry: Any) -> FailedAttempt | None:
    """Return the failed attempt that an entry of ``reports`` tells of; ``None`` if it is about none.

    Envoy's router writes an entry for each attempt at an instance, and its connection manager one for each
    request that a client left or that Envoy answered with an error of its own; ``envoy/envoy.yaml`` filters
    both, so that nothing comes for those that went well.
    """
    downstream = entry.common_properties.access_log_type == AccessLogType.DownstreamEnd
    failure = _failure_of_request(entry) if downstream else _failure_of_attempt(entry)
    if failure is None:
        return None
    headers = entry.request.request_headers
    return FailedAttempt(
        _address(entry),
        failure,
        headers.get(names.ID),
        headers.get(names.ATTEMPT, "1") == "1",
        entry.response.response_code.value,
        retry_after(entry.response.response_headers.get("retry-after", "")),
        headers.get(names.CLIENT_REQUEST_ID) or entry.request.request_id,
    )


def read_result(entry: Any) -> Result | None:
    """Return how the request of an entry of ``results`` has ended; ``None`` if it is none of ours."""
    request = entry.request.request_headers.get(names.ID)
    if not request:
        return None
    common, status = entry.common_properties, entry.response.response_code.value
    ttft = common.custom_tags.get(TTFT, "")
    has_sent = common.HasField("time_to_last_upstream_tx_byte")
    return Result(
        request,
        _ending(common, status),
        status,
        _seconds(common.duration),
        int(ttft[:_MAX_DIGITS]) / 1e6 if ttft.isascii() and ttft.isdigit() else None,
        _seconds(common.time_to_last_upstream_tx_byte) if has_sent else None,
        _address(entry),
        entry.response.response_body_bytes,
    )


_MAX_DIGITS = 18


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


def _ending(common: Any, status: int) -> Ending:
    if status == 200 and not common.HasField("response_flags"):
        return Ending.OK
    flags = common.response_flags
    if flags.downstream_connection_termination or flags.downstream_remote_reset:
        return Ending.LEFT
    if status < 200 or status >= 500:
        return Ending.ERROR
    if status >= 400:
        return Ending.CLIENT_ERROR
    broken = flags.upstream_request_timeout or any(getattr(flags, name) for name in _RESETS)
    return Ending.CUT if broken else Ending.OK


def _seconds(duration: Any) -> float:
    return max(0.0, float(duration.seconds + duration.nanos / 1e9))


def _address(entry: Any) -> str:
    socket = entry.common_properties.upstream_remote_address.socket_address
    return join_address(socket.address, socket.port_value) if socket.port_value else ""


def retry_after(value: str) -> float | None:
    """Return a ``Retry-After`` in seconds; a date, which no vLLM sends, counts as none."""
    return min(float(value), MAX_RETRY_AFTER_S) if value.isdecimal() else None
