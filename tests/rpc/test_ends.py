"""The end of a call that its client does not wait for goes with what is sent next."""

from __future__ import annotations

import asyncio
import unittest
from typing import Any

from h2.connection import H2Connection
from h2.events import DataReceived, StreamEnded
from tests.support.waiting import until

from vllm_pd_scheduler.rpc import Call, Method
from vllm_pd_scheduler.rpc.protocol import GrpcProtocol

HEAD = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "test"),
    (":path", "/test/echo"),
    ("content-type", "application/grpc"),
]


class Echo:
    """Answers each message with itself, and ends a call that its client has ended."""

    def __init__(self, call: Call) -> None:
        self.call = call
        call.next()

    def accepts(self, size: int) -> bool:
        return True

    def message(self, data: bytes | bytearray) -> None:
        self.call.write(data)

    def written(self) -> None:
        self.call.next()

    def half_closed(self) -> None:
        self.call.finish_later()

    def cancelled(self) -> None:
        pass


class Transport(asyncio.Transport):
    """Keeps what is written, one write each."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class Owner:
    def began(self, connection: GrpcProtocol) -> None:
        pass

    def ended(self, connection: GrpcProtocol) -> None:
        pass

    def complain(self, what: str) -> None:
        raise AssertionError(what)


class EndTest(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.transport, self.client = Transport(), H2Connection()
        self.protocol = GrpcProtocol({b"/test/echo": Method(Echo, 1000)}, Owner())
        self.protocol.connection_made(self.transport)
        self.addCleanup(self.protocol.connection_lost, None)
        self.client.initiate_connection()
        self.client.update_settings({1: 0})
        await until(lambda: self.transport.writes)
        self.hear()
        self.tell()
        self.hear()

    def tell(self) -> None:
        """Let the server read what the client has sent."""
        self.protocol.data_received(self.client.data_to_send())

    def hear(self) -> list[Any]:
        """Return what the client reads of all that was written until now."""
        data, self.transport.writes = b"".join(self.transport.writes), []
        return self.client.receive_data(data)

    def begin(self, stream: int) -> None:
        self.client.send_headers(stream, HEAD)
        self.client.send_data(stream, b"\0\0\0\0\1x")

    def ended(self) -> list[int]:
        return [event.stream_id for event in self.hear() if isinstance(event, StreamEnded)]

    async def test_it_goes_with_the_next_message(self) -> None:
        self.begin(1)
        self.tell()
        self.assertEqual([type(event) for event in self.hear()].count(DataReceived), 1)
        self.client.end_stream(1)
        self.tell()
        self.assertEqual(self.transport.writes, [])
        self.begin(3)
        self.tell()
        self.assertEqual(len(self.transport.writes), 1)
        self.assertEqual(self.ended(), [1])

    async def test_it_goes_soon_if_there_is_none(self) -> None:
        for stream in (1, 3):
            self.begin(stream)
            self.client.end_stream(stream)
        self.tell()
        ended: list[int] = []

        def both() -> bool:
            ended.extend(self.ended())
            return len(ended) == 2

        await until(both)
        self.assertTrue(self.protocol.is_idle)

    async def test_it_goes_before_the_connection_is_closed(self) -> None:
        self.begin(1)
        self.tell()
        self.client.end_stream(1)
        self.tell()
        self.protocol.close()
        self.assertEqual(self.ended(), [1])
        self.assertTrue(self.transport.closed)

    async def test_one_that_the_client_has_reset_meanwhile_is_over(self) -> None:
        self.begin(1)
        self.tell()
        self.client.end_stream(1)
        self.tell()
        self.client.reset_stream(1)
        self.begin(3)
        self.tell()
        self.assertEqual(self.ended(), [])

    async def test_one_without_an_answer_ends_at_once(self) -> None:
        self.client.send_headers(1, HEAD, end_stream=True)
        self.tell()
        self.assertEqual(self.ended(), [1])
