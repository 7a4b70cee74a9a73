"""What is read of Envoy's log of failed attempts."""

import asyncio
import unittest
from typing import Any
from unittest import mock

from envoy.data.accesslog.v3.accesslog_pb2 import AccessLogType, HTTPAccessLogEntry
from envoy.service.accesslog.v3 import als_pb2

from tests.support.waiting import until
from vllm_pd_scheduler.envoy import access_log
from vllm_pd_scheduler.envoy.access_log import AccessLog, read_attempt, read_message, read_result
from vllm_pd_scheduler.envoy.limits import BadMessage
from vllm_pd_scheduler.request import headers as names
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.telemetry import Ending, log_lines


class Stream:
    """Envoy's side of a stream: messages, and then its end."""

    connection = None

    def __init__(self, *messages: bytes) -> None:
        self._messages = [*messages, None]

    async def read(self) -> bytes | None:
        return self._messages.pop(0)

    async def write(self, _: bytes) -> None:
        pass


class AccessLogTest(unittest.IsolatedAsyncioTestCase):
    async def test_what_is_logged_of_an_attempt_has_its_requests_id(self) -> None:
        message = als_pb2.StreamAccessLogsMessage()
        for name in ("r1", "r2"):
            entry = message.http_logs.log_entry.add()
            entry.common_properties.access_log_type = AccessLogType.DownstreamEnd
            entry.request.request_id = name
        seen = []

        def failed(attempt: FailedAttempt) -> None:
            seen.append((attempt.request_id, log_lines.request_id.get()))

        stream: Any = Stream(message.SerializeToString())
        await AccessLog(failed, self.fail, lambda _: True)._stream(stream)
        self.assertEqual(seen, [("r1", "r1"), ("r2", "r2")])
        self.assertEqual(log_lines.request_id.get(), "")


class OpenStream:
    """Envoy's side of a stream that stays open, of a connection."""

    def __init__(self, connection: str) -> None:
        self.connection = connection
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.read = self.messages.get

    async def write(self, _: bytes) -> None:
        pass


class EndedStreamsTest(unittest.IsolatedAsyncioTestCase):
    """Envoy opens a stream that has ended at the nearest scheduler, when it has something to tell."""

    async def asyncSetUp(self) -> None:
        self.seen: list[str | None] = []
        log = AccessLog(lambda attempt: self.seen.append(attempt.request), self.fail, "ours".__eq__)
        self.streams = [OpenStream(connection) for connection in "aab"]
        self.tasks = [asyncio.ensure_future(log._stream(each)) for each in self.streams]  # type: ignore[arg-type]
        await asyncio.sleep(0)

    async def asyncTearDown(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def tell(self, request: str) -> None:
        message = als_pb2.StreamAccessLogsMessage()
        entry = message.http_logs.log_entry.add()
        entry.common_properties.upstream_remote_address.socket_address.port_value = 8000
        if request:
            entry.request.request_headers[names.ID] = request
        self.streams[0].messages.put_nowait(message.SerializeToString())
        seen = len(self.seen)
        await until(lambda: len(self.seen) > seen)

    def ended(self) -> list[bool]:
        return [task.done() for task in self.tasks]

    @mock.patch.multiple(access_log, STREAM_S=0.0)
    async def test_those_of_a_connection_that_tells_of_others_requests(self) -> None:
        await self.tell("ours")
        await self.tell("")
        await asyncio.sleep(0)
        self.assertEqual(self.ended(), [False, False, False])
        await self.tell("another's")
        await until(lambda: self.ended() == [True, True, False])
        for task in self.tasks[:2]:
            self.assertIsNone(task.exception())

    async def test_one_that_was_opened_just_before_is_kept_for_a_while(self) -> None:
        for number in range(3):
            await self.tell(f"before a restart {number}")
        self.assertEqual(self.ended(), [False, False, False])
        self.assertEqual(len(self.seen), 3)

    async def test_those_that_say_nothing(self) -> None:
        for task in self.tasks:
            task.cancel()
        with mock.patch.multiple(access_log, IDLE_S=0.0):
            log = AccessLog(self.fail, self.fail, "ours".__eq__)
            await log._stream(OpenStream("c"))  # type: ignore[arg-type]
        self.assertEqual(log._open, {})


def read(message: als_pb2.StreamAccessLogsMessage) -> list[FailedAttempt]:
    entries = read_message(message.SerializeToString()).http_logs.log_entry
    return [attempt for attempt in map(read_attempt, entries) if attempt is not None]


class ReadAttemptTest(unittest.TestCase):
    def read(self, status: int = 0, attempt: str = "1", port: int = 8000, **flags: bool) -> Any:
        message = als_pb2.StreamAccessLogsMessage()
        entry = message.http_logs.log_entry.add()
        entry.common_properties.upstream_remote_address.socket_address.address = "10.0.0.1"
        entry.common_properties.upstream_remote_address.socket_address.port_value = port
        for name, value in flags.items():
            setattr(entry.common_properties.response_flags, name, value)
        if status:
            entry.response.response_code.value = status
        entry.request.request_headers[names.ID] = "id-1"
        entry.request.request_headers[names.ATTEMPT] = attempt
        return read(message)

    def test_how_it_failed(self) -> None:
        for found, failure in (
            (self.read(upstream_connection_failure=True), Failure.CONNECT),
            (self.read(upstream_connection_termination=True), Failure.RESET),
            (self.read(upstream_remote_reset=True), Failure.RESET),
            (self.read(upstream_request_timeout=True), Failure.TIMEOUT),
            (self.read(status=500), Failure.STATUS),
            (self.read(status=302), Failure.STATUS),
            (self.read(status=204), Failure.STATUS),
            (self.read(status=503), Failure.OVERLOADED),
            (self.read(status=429), Failure.OVERLOADED),
            (self.read(status=400), Failure.REFUSED),
            (self.read(), Failure.LEFT),
            (self.read(upstream_protocol_error=True), Failure.RESET),
            (self.read(status=200, upstream_connection_termination=True), Failure.CUT),
            (self.read(status=200, upstream_protocol_error=True), Failure.CUT),
        ):
            (attempt,) = found
            self.assertEqual(attempt, FailedAttempt("10.0.0.1:8000", failure, "id-1", True, attempt.status))

    def test_further_attempts(self) -> None:
        self.assertFalse(self.read(status=500, attempt="2")[0].first)

    def test_what_is_nobodys_fault(self) -> None:
        self.assertEqual(self.read(status=503, port=0), [])
        with self.assertRaises(BadMessage):
            read_message(b"\xff\xff")

    def test_a_client_that_left_before_envoy_had_our_answer(self) -> None:
        """Only its ``X-Request-Id`` is known."""
        message = als_pb2.StreamAccessLogsMessage()
        entry = message.http_logs.log_entry.add()
        entry.common_properties.access_log_type = AccessLogType.DownstreamEnd
        entry.common_properties.response_flags.downstream_connection_termination = True
        entry.request.request_id = "r"
        (attempt,) = read(message)
        self.assertEqual(attempt, FailedAttempt("", Failure.UNSENT, None, request_id="r"))

    def test_a_stream_that_was_cut_for_its_pause(self) -> None:
        """No attempt tells of it: Envoy counts the pause for the stream as a whole."""
        message = als_pb2.StreamAccessLogsMessage()
        entry = message.http_logs.log_entry.add()
        entry.common_properties.access_log_type = AccessLogType.DownstreamEnd
        entry.common_properties.response_flags.stream_idle_timeout = True
        entry.common_properties.upstream_remote_address.socket_address.address = "10.0.0.1"
        entry.common_properties.upstream_remote_address.socket_address.port_value = 8000
        entry.request.request_headers[names.ID] = "id-1"
        entry.request.request_headers[names.ATTEMPT] = "1"
        for status, failure in ((200, Failure.CUT), (504, None)):
            entry.response.response_code.value = status
            found = [each.failure for each in read(message)]
            self.assertEqual(found, [failure] if failure else [])


class ReadResultTest(unittest.TestCase):
    def read(self, status: int = 200, request: str = "id-1", ttft: str = "250000", **flags: bool) -> Any:
        entry = HTTPAccessLogEntry()
        common = entry.common_properties
        common.upstream_remote_address.socket_address.address = "10.0.0.1"
        common.upstream_remote_address.socket_address.port_value = 8000
        common.duration.FromMilliseconds(1500)
        common.time_to_last_upstream_tx_byte.FromMilliseconds(125)
        common.custom_tags["ttft"] = ttft
        for name, value in flags.items():
            setattr(common.response_flags, name, value)
        if status:
            entry.response.response_code.value = status
        if request:
            entry.request.request_headers[names.ID] = request
        return read_result(HTTPAccessLogEntry.FromString(entry.SerializeToString()))

    def test_its_times_are_in_seconds(self) -> None:
        whole = Result("id-1", Ending.OK, 200, 1.5, 0.25, 0.125, "10.0.0.1:8000")
        self.assertEqual(self.read(), whole)

    def test_how_it_ended(self) -> None:
        for found, ending in (
            (self.read(), Ending.OK),
            (self.read(status=302), Ending.OK),
            (self.read(status=400), Ending.CLIENT_ERROR),
            (self.read(status=503), Ending.ERROR),
            (self.read(status=0), Ending.ERROR),
            (self.read(status=0, downstream_connection_termination=True), Ending.LEFT),
            (self.read(downstream_connection_termination=True), Ending.LEFT),
            (self.read(downstream_remote_reset=True), Ending.LEFT),
            (self.read(upstream_connection_termination=True), Ending.CUT),
            (self.read(stream_idle_timeout=True), Ending.CUT),
            (self.read(status=504, upstream_request_timeout=True), Ending.ERROR),
        ):
            self.assertEqual(found.ending, ending)

    def test_without_a_body_there_is_no_first_token(self) -> None:
        for tag in ("-", "", "soon", "-1", "\u0661", "1e3"):
            self.assertIsNone(self.read(ttft=tag).ttft, tag)
        self.assertIsInstance(self.read(ttft="9" * 5000).ttft, float)  # int() takes 4,300 digits at most

    def test_a_request_that_is_none_of_ours(self) -> None:
        self.assertIsNone(self.read(request=""))

    def test_what_does_not_exist_is_no_error(self) -> None:
        entry = HTTPAccessLogEntry()
        entry.request.request_headers[names.ID] = "id-1"
        self.assertEqual(read_result(entry), Result("id-1", Ending.ERROR, 0, 0.0, None, None, ""))
