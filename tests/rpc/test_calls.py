"""Calls of a client that others have written: messages, statuses, ends, and what is no call."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import h2.config
import h2.connection
import h2.events

from tests.support.certificates import make_certificates
from tests.support.rpc import OPTIONS, served
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.config.tls import TlsConfig
from vllm_pd_scheduler.rpc import Call, CallError, Method, Server, ServerStream, StatusCode, served_by
from vllm_pd_scheduler.rpc import call as call_module
from vllm_pd_scheduler.rpc import protocol as protocol_module

LIMIT = 8 << 20
HEAD = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "a"),
    (":path", "/test/echo"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


class Case(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.started = asyncio.Event()
        self.ended: list[str] = []
        self.go = asyncio.Event()

    def methods(self) -> dict[str, Method]:
        handlers = (self.echo, self.refuse, self.broken, self.hang, self.silent, self.big)
        return {f"/test/{each.__name__}": served_by(each, LIMIT) for each in handlers}

    async def echo(self, stream: ServerStream) -> None:
        while (data := await stream.read()) is not None:
            await stream.write(data)

    async def refuse(self, stream: ServerStream) -> None:
        raise CallError(StatusCode.PERMISSION_DENIED, "50 % of é\nand more")

    async def broken(self, stream: ServerStream) -> None:
        raise RuntimeError("a bug")

    async def hang(self, stream: ServerStream) -> None:
        self.started.set()
        try:
            await asyncio.sleep(HUNG_S)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise

    async def silent(self, stream: ServerStream) -> None:
        """Read nothing until it is told to."""
        self.started.set()
        await self.go.wait()
        while await stream.read() is not None:
            pass

    async def big(self, stream: ServerStream) -> None:
        self.started.set()
        try:
            await stream.write(bytes(LIMIT))
            self.ended.append("written")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


class ClientTest(Case):
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.channel = await self.enterAsyncContext(served(methods=self.methods()))

    def call(self, name: str, **more: Any) -> Any:
        return self.channel.stream_stream(f"/test/{name}")(**more)

    async def status(self, call: Any) -> tuple[str, str]:
        async with asyncio.timeout(HUNG_S):
            return (await call.code()).name, await call.details()

    async def test_unary(self) -> None:
        method = self.channel.unary_unary("/test/echo")
        for data in (b"", b"x", bytes(70_000), bytes(LIMIT)):
            self.assertEqual(await method(data), data)

    async def test_a_stream_of_messages_of_all_sizes(self) -> None:
        call = self.call("echo")
        sizes = (0, 1, 16_379, 16_380, 65_536, 65_537, 300_000, 3 << 20, 0)
        for size in sizes:
            await call.write(bytes([size % 256]) * size)
            self.assertEqual(await call.read(), bytes([size % 256]) * size)
        await call.done_writing()
        self.assertIs(await call.read(), grpc.aio.EOF)
        self.assertEqual(await self.status(call), ("OK", ""))

    async def test_many_at_once(self) -> None:
        method = self.channel.unary_unary("/test/echo")
        contents = [bytes([number % 256]) * (number * 997 % 200_000) for number in range(300)]
        self.assertEqual(await asyncio.gather(*map(method, contents)), contents)

    async def test_messages_that_come_together(self) -> None:
        call = self.call("echo")
        for number in range(2000):
            await call.write(b"%d" % number)
        await call.done_writing()
        self.assertEqual([data async for data in call], [b"%d" % number for number in range(2000)])

    async def test_statuses(self) -> None:
        self.assertEqual(await self.status(self.call("refuse")), ("PERMISSION_DENIED", "50 % of é\nand more"))
        self.assertEqual(
            await self.status(self.call("none")), ("UNIMPLEMENTED", "there is no method /test/none")
        )
        with self.assertLogs("vllm_pd_scheduler.rpc", "ERROR"):
            self.assertEqual(await self.status(self.call("broken")), ("INTERNAL", "RuntimeError"))

    async def test_a_message_that_is_too_large(self) -> None:
        call = self.call("echo")
        with self.assertLogs("vllm_pd_scheduler.rpc", "WARNING"):
            await call.write(bytes(LIMIT + 1))
            status = await self.status(call)
        self.assertEqual(
            status, ("RESOURCE_EXHAUSTED", f"a message of {LIMIT + 1} bytes: at most {LIMIT} are read")
        )

    async def test_a_compressed_message(self) -> None:
        call = self.call("echo", compression=grpc.Compression.Gzip)
        await call.write(bytes(10_000))
        self.assertEqual((await self.status(call))[0], "UNIMPLEMENTED")

    async def test_a_client_that_leaves(self) -> None:
        call = self.call("hang")
        await self.started.wait()
        call.cancel()
        await until(lambda: self.ended == ["cancelled"])

    async def test_a_connection_that_ends(self) -> None:
        self.call("hang")
        await self.started.wait()
        await self.channel.close()
        await until(lambda: self.ended == ["cancelled"])

    async def test_a_deadline(self) -> None:
        call = self.call("hang", timeout=0.2)
        self.assertEqual((await self.status(call))[0], "DEADLINE_EXCEEDED")
        await until(lambda: self.ended == ["cancelled"])

    async def test_what_is_not_read_stops_the_client_and_no_other(self) -> None:
        call = self.call("silent")
        await self.started.wait()

        async def write() -> None:
            for _ in range(64):
                await call.write(bytes(100_000))
            await call.done_writing()

        writing = asyncio.ensure_future(write())
        self.assertEqual(await self.channel.unary_unary("/test/echo")(b"x"), b"x")
        self.go.set()
        await writing
        self.assertEqual((await self.status(call))[0], "OK")

    async def test_a_call_that_has_ended_is_gone(self) -> None:
        """Nothing of it waits for the garbage collector."""
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        for name in ("echo", "refuse", "none"):
            for _ in range(5):
                call = self.call(name)
                if name == "echo":
                    await call.write(b"x")
                    await call.read()
                    await call.done_writing()
                await call.code()
        self.assertEqual([each for each in gc.get_objects() if isinstance(each, Call)], [])

    async def test_the_metadata(self) -> None:
        asked: list[str | None] = []

        async def tell(stream: ServerStream) -> None:
            asked.extend((stream.metadata("x-pd-id"), stream.metadata("none")))
            await stream.write(b"")

        async with served(methods={"/test/tell": served_by(tell, 1)}) as channel:
            await channel.unary_unary("/test/tell")(b"", metadata=(("x-pd-id", "1"),))
        self.assertEqual(asked, ["1", None])


class RawTest(Case):
    """A client that does what gRPC's would not."""

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.server = Server(self.methods())
        self.addAsyncCleanup(self.server.stop)
        port = await self.server.listen("127.0.0.1", 0)
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        self.addCleanup(self.writer.close)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []

    def open(self, *more: tuple[str, str], end: bool = False, **changed: str) -> int:
        stream_id: int = self.h2.get_next_available_stream_id()
        names = {
            f":{name}" if name in ("method", "path") else name.replace("_", "-"): v
            for name, v in changed.items()
        }
        head = [(name, names.get(name, value)) for name, value in HEAD]
        self.h2.send_headers(stream_id, [*head, *more], end_stream=end)
        return stream_id

    async def until_event(self, kind: type[Any], stream_id: int | None = None) -> Any:
        """The next event of a kind; nothing that comes is acknowledged."""
        async with asyncio.timeout(HUNG_S):
            while True:
                self.writer.write(self.h2.data_to_send())
                for event in self.events:
                    if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                        self.events.remove(event)
                        return event
                data = await self.reader.read(1 << 16)
                self.assertTrue(data, "the connection was closed")
                self.events += self.h2.receive_data(data)

    async def test_what_is_no_call(self) -> None:
        for changed, status in (
            ({"method": "GET"}, "405"),
            ({"content_type": "application/json"}, "415"),
        ):
            stream_id = self.open(**changed)
            response = await self.until_event(h2.events.ResponseReceived, stream_id)
            self.assertEqual(dict(response.headers)[b":status"], status.encode())
            await self.until_event(h2.events.StreamEnded, stream_id)

    async def test_a_call_without_a_message_ends(self) -> None:
        stream_id = self.open(end=True)
        response = await self.until_event(h2.events.ResponseReceived, stream_id)
        self.assertEqual(dict(response.headers)[b"grpc-status"], b"0")

    async def test_half_a_message(self) -> None:
        for part in (b"\0\0", b"\0\0\0\0\5hell"):
            stream_id = self.open()
            self.h2.send_data(stream_id, part, end_stream=True)
            response = await self.until_event(h2.events.ResponseReceived, stream_id)
            self.assertEqual(dict(response.headers)[b"grpc-status"], b"13")

    async def test_a_bad_timeout_is_none(self) -> None:
        for value in ("", "1", "x", "123456789S", "-1S", "1s"):
            stream_id = self.open(("grpc-timeout", value), end=True)
            response = await self.until_event(h2.events.ResponseReceived, stream_id)
            self.assertEqual(dict(response.headers)[b"grpc-status"], b"0")

    async def test_messages_that_do_not_end(self) -> None:
        """Each takes memory: of all that a connection has begun there is not more than the limit."""
        self.enterContext(mock.patch.object(call_module, "MAX_UNFINISHED_BYTES", 100_000))
        streams = [self.open() for _ in range(4)]
        for stream_id in streams:
            self.h2.send_data(stream_id, b"\0\0\0\x90\0x")  # of 36,864 bytes
        for stream_id in streams[2:]:
            response = await self.until_event(h2.events.ResponseReceived, stream_id)
            self.assertEqual(dict(response.headers)[b"grpc-status"], b"8")
        (connection,) = self.server._connections
        self.assertEqual(connection.unfinished, 2 * 36_864)
        self.h2.reset_stream(streams[0])
        for size in (16_000, 16_000, 4_863):
            self.h2.send_data(streams[1], bytes(size))
        await self.until_event(h2.events.DataReceived, streams[1])
        self.assertEqual(connection.unfinished, 0)

    async def test_an_answer_that_is_not_taken(self) -> None:
        """It waits, also beyond the first windows, until the client takes it or leaves."""
        stream_id = self.open(path="/test/big", end=True)
        await self.until_event(h2.events.DataReceived, stream_id)
        await asyncio.sleep(0.05)
        self.assertEqual(self.ended, [])
        self.h2.reset_stream(stream_id)
        self.writer.write(self.h2.data_to_send())
        await until(lambda: self.ended == ["cancelled"])
        (connection,) = self.server._connections
        self.assertEqual(connection.connection.streams, {})

    async def test_one_that_does_not_read_from_its_socket(self) -> None:
        """What it asks for stays within a limit, and its connection ends."""
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]
        self.h2.update_settings({4: (1 << 31) - 1})
        self.h2.increment_flow_control_window((1 << 31) - 1 - 65_535)
        self.open(path="/test/big", end=True)
        self.writer.write(self.h2.data_to_send())
        await self.started.wait()
        (connection,) = self.server._connections
        await until(lambda: connection.connection._output.held)
        with self.assertLogs("vllm_pd_scheduler.rpc", "WARNING") as logs:
            for _ in range(1100):
                self.h2.ping(bytes(8))
            self.writer.write(self.h2.data_to_send())
            await until(lambda: not self.server._connections)
        self.assertIn("what was asked for is not read (ENHANCE_YOUR_CALM)", logs.output[0])

    async def test_one_that_breaks_the_protocol_hears_why(self) -> None:
        self.open()
        self.writer.write(self.h2.data_to_send() + b"\0\0\0\x01\0\0\0\0\0")
        with self.assertLogs("vllm_pd_scheduler.rpc", "WARNING"):
            ended = await self.until_event(h2.events.ConnectionTerminated)
        self.assertEqual(ended.error_code, 1)
        async with asyncio.timeout(HUNG_S):
            self.assertEqual(await self.reader.read(), b"")

    async def test_the_end_lets_calls_end(self) -> None:
        stream_id = self.open()
        self.h2.send_data(stream_id, b"\0\0\0\0\1x")
        await self.until_event(h2.events.DataReceived, stream_id)
        stopping = asyncio.ensure_future(self.server.stop(grace=HUNG_S))
        await self.until_event(h2.events.ConnectionTerminated)
        # h2 takes no more after GOAWAY, so the rest is written by hand: DATA with END_STREAM
        self.writer.write(b"\0\0\0\0\1" + stream_id.to_bytes(4, "big"))
        async with asyncio.timeout(HUNG_S):
            await stopping
            self.assertIn(b"grpc-status", await self.reader.read())


class TlsTest(Case):
    def setUp(self) -> None:
        self.made = make_certificates(Path(self.enterContext(tempfile.TemporaryDirectory())))
        self.ca = Path(self.made.ca).read_bytes()

    async def test_messages(self) -> None:
        server = Server(self.methods())
        self.addAsyncCleanup(server.stop)
        port = await server.listen("127.0.0.1", 0, TlsConfig(**self.made.server).context())
        credentials = grpc.ssl_channel_credentials(self.ca)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=OPTIONS) as channel:
            for size in (0, 1, 100_000, LIMIT):
                self.assertEqual(await channel.unary_unary("/test/echo")(bytes(size)), bytes(size))


class BlockedLoopTest(Case):
    async def test_an_answer_to_a_ping_that_was_not_read_yet_counts(self) -> None:
        """A loop that stood still finds the alarm first, and the answer after it."""
        server = Server(self.methods())
        self.addAsyncCleanup(server.stop)
        port = await server.listen("127.0.0.1", 0)
        quick = {"KEEPALIVE_INTERVAL_S": 0.05, "KEEPALIVE_TIMEOUT_S": 0.05, "DOUBT_S": 5.0}
        with mock.patch.multiple(protocol_module, **quick):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
                call = channel.stream_stream("/test/echo")()
                await call.write(b"x")
                await call.read()
                for _ in range(3):
                    time.sleep(0.2)  # noqa: ASYNC251 - that is what it is about
                    await asyncio.sleep(0.1)
                await call.write(b"y")
                self.assertEqual(await call.read(), b"y")


if __name__ == "__main__":
    unittest.main()
