"""What is read of Envoy's log of failed attempts."""

import unittest
from typing import Any

from envoy.data.accesslog.v3.accesslog_pb2 import AccessLogType
from envoy.service.accesslog.v3 import als_pb2

from vllm_pd_scheduler.envoy.access_log import AttemptLog, read_attempts
from vllm_pd_scheduler.envoy.limits import BadMessage
from vllm_pd_scheduler.request import headers as names
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.telemetry import log_lines


class Stream:
    """Envoy's side of a stream: messages, and then its end."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = [*messages, None]

    async def read(self) -> bytes | None:
        return self._messages.pop(0)

    async def write(self, _: bytes) -> None:
        pass


class AttemptLogTest(unittest.IsolatedAsyncioTestCase):
    async def test_what_is_logged_of_an_attempt_has_its_requests_id(self) -> None:
        message = als_pb2.StreamAccessLogsMessage()
        for name in ("r1", "r2"):
            entry = message.http_logs.log_entry.add()
            entry.common_properties.access_log_type = AccessLogType.DownstreamEnd
            entry.request.request_id = name
        seen = []
        attempts = AttemptLog(lambda attempt: seen.append((attempt.request_id, log_lines.request_id.get())))
        stream: Any = Stream(message.SerializeToString())
        await attempts._stream(stream)
        self.assertEqual(seen, [("r1", "r1"), ("r2", "r2")])
        self.assertEqual(log_lines.request_id.get(), "")


class ReadAttemptsTest(unittest.TestCase):
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
        return list(read_attempts(message.SerializeToString()))

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
            list(read_attempts(b"\xff\xff"))

    def test_a_client_that_left_before_envoy_had_our_answer(self) -> None:
        """Only its ``X-Request-Id`` is known."""
        message = als_pb2.StreamAccessLogsMessage()
        entry = message.http_logs.log_entry.add()
        entry.common_properties.access_log_type = AccessLogType.DownstreamEnd
        entry.common_properties.response_flags.downstream_connection_termination = True
        entry.request.request_id = "r"
        (attempt,) = read_attempts(message.SerializeToString())
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
            found = [each.failure for each in read_attempts(message.SerializeToString())]
            self.assertEqual(found, [failure] if failure else [])
