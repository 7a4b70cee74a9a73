"""The gRPC server: where it listens, who may connect, and what one message may cost."""

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
from envoy.service.accesslog.v3 import als_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import unused_ports
from tests.support.proxy import proxy
from tests.support.rpc import OPTIONS
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.envoy import access_log
from vllm_pd_scheduler.envoy.access_log import MAX_ENTRIES, AccessLog
from vllm_pd_scheduler.envoy.health import HealthService
from vllm_pd_scheduler.envoy.limits import MAX_HEALTH_BYTES, MAX_MESSAGE_BYTES
from vllm_pd_scheduler.http2.frames import PREFACE
from vllm_pd_scheduler.request import headers as names
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.rpc import ListenError, Server, protocol

ANY = health_pb2.HealthCheckRequest()
SERVING = health_pb2.HealthCheckResponse.SERVING


class Case(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = str(self.directory / "grpc")
        self.attempts: list[FailedAttempt] = []
        self.results: list[Result] = []
        services = (HealthService(), AccessLog(self.attempts.append, self.results.append, lambda _: True))
        self.server = Server({path: each for service in services for path, each in service.methods().items()})

    async def asyncTearDown(self) -> None:
        await self.server.stop()

    def channel_to(self, target: str) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        self.addAsyncCleanup(channel.close)
        return channel

    async def at_socket(self) -> grpc.aio.Channel:
        await self.server.listen_on_socket(self.path)
        return self.channel_to(f"unix:{self.path}")

    async def at_port(self) -> grpc.aio.Channel:
        return self.channel_to(f"127.0.0.1:{await self.server.listen('127.0.0.1', 0)}")

    async def check(self, channel: grpc.aio.Channel, service: str = "") -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=HUNG_S)
        return int(answer.status)


class SocketTest(Case):
    async def test_only_this_user_can_open_it(self) -> None:
        self.addCleanup(os.umask, os.umask(0))
        channel = await self.at_socket()
        self.assertEqual(stat.S_IMODE(os.lstat(self.path).st_mode), 0o600)
        self.assertEqual(os.umask(0), 0, "the process's own umask is as it was")
        self.assertEqual(await self.check(channel), SERVING)
        await self.server.stop()
        self.assertEqual(os.listdir(self.directory), [])

    async def test_there_is_no_moment_in_which_others_can(self) -> None:
        """Not made with other permissions and changed after."""
        bind, modes = socket.socket.bind, []

        def watched(made: socket.socket, address: Any) -> None:
            bind(made, address)
            modes.append(stat.S_IMODE(os.lstat(address).st_mode))

        with mock.patch("os.chmod") as chmod, mock.patch.object(socket.socket, "bind", watched):
            await self.at_socket()
        self.assertEqual((modes, chmod.call_count), ([0o600], 0))

    async def test_what_a_killed_process_left_is_replaced(self) -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(self.path)
            left.listen()
        self.assertEqual(await self.check(await self.at_socket()), SERVING)

    async def test_what_another_serves_is_not_replaced(self) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(self.path)
            other.listen()
            with self.assertRaisesRegex(
                ListenError, f"^cannot listen on {self.path}: another process serves"
            ):
                await self.at_socket()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(self.path)

    async def test_what_is_no_socket_is_not_replaced(self) -> None:
        os.mkdir(self.path)
        with self.assertRaisesRegex(ListenError, "there is something else"):
            await self.at_socket()
        self.assertTrue(stat.S_ISDIR(os.lstat(self.path).st_mode))

    async def test_where_none_can_be(self) -> None:
        for path, reason in (
            (f"{self.directory}/none/grpc", "is its directory there, and writable"),
            (f"{self.directory}/{'x' * 107}", "at most 107 bytes"),
        ):
            with self.subTest(reason), self.assertRaisesRegex(ListenError, reason):
                await self.server.listen_on_socket(path)


class PortTest(Case):
    async def test_a_port(self) -> None:
        channel = await self.at_port()
        self.assertEqual(await self.check(channel), SERVING)

    async def test_one_that_cannot_be_had_is_told_with_the_reason(self) -> None:
        port = unused_ports(1)[0]
        with socket.create_server(("127.0.0.1", port)):
            for host, reason in (
                ("127.0.0.1", f"^cannot listen on 127.0.0.1:{port}: Address already in use$"),
                ("192.0.2.1", f"^cannot listen on 192.0.2.1:{port}: Cannot assign requested address$"),
                ("nowhere.invalid", f"^cannot listen on nowhere.invalid:{port}: "),
            ):
                with self.subTest(host), self.assertRaisesRegex(ListenError, reason):
                    await self.server.listen(host, port)


class KeepaliveTest(Case):
    async def test_a_client_that_vanished_is_found(self) -> None:
        """The end of its call is seen as if it had left."""
        between = unused_ports(1)[0]
        quick = {"KEEPALIVE_INTERVAL_S": 0.3, "KEEPALIVE_TIMEOUT_S": 0.3}
        self.enterContext(mock.patch.multiple(protocol, **quick))
        port = await self.server.listen("127.0.0.1", 0)
        async with proxy(between, port) as wire:
            call = health_pb2_grpc.HealthStub(self.channel_to(f"127.0.0.1:{between}")).Watch(ANY)
            self.assertEqual((await call.read()).status, SERVING)
            self.assertEqual(calls(), 1)
            wire.freeze()
            await until(lambda: calls() == 0)
            self.assertFalse(self.server._connections)

    async def test_one_that_is_silent_is_not(self) -> None:
        """It answers pings, though nothing else is said."""
        self.enterContext(
            mock.patch.multiple(protocol, KEEPALIVE_INTERVAL_S=0.05, KEEPALIVE_TIMEOUT_S=HUNG_S)
        )
        call = health_pb2_grpc.HealthStub(await self.at_port()).Watch(ANY)
        await call.read()
        (connection,) = self.server._connections
        with mock.patch.object(connection.connection, "ping", side_effect=connection.connection.ping) as ping:
            await until(lambda: ping.call_count > 4)
        self.assertEqual(calls(), 1)
        self.assertFalse(call.done())

    async def test_one_that_says_nothing_at_all(self) -> None:
        """It has connected, and does not speak HTTP/2."""
        self.enterContext(mock.patch.multiple(protocol, PREFACE_S=0.1))
        port = await self.server.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PREFACE[:10])
        async with asyncio.timeout(HUNG_S):
            with contextlib.suppress(ConnectionError):
                while await reader.read(1000):
                    pass
        writer.close()


def calls() -> int:
    return sum("_Coroutine._run" in repr(task.get_coro()) for task in asyncio.all_tasks())


class HealthTest(Case):
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.channel = await self.at_socket()

    async def test_another_service_is_not_found(self) -> None:
        with self.assertRaises(grpc.aio.AioRpcError) as caught:
            await self.check(self.channel, "other")
        self.assertIs(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    async def test_what_is_no_check(self) -> None:
        for method in ("Check", "Watch"):
            for data, code in (
                (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
                (b"\x0a" * (MAX_HEALTH_BYTES + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                with self.subTest(method, code=code):
                    make = self.channel.unary_unary if method == "Check" else self.channel.unary_stream
                    call = make(f"/grpc.health.v1.Health/{method}")(data)
                    async with asyncio.timeout(HUNG_S):
                        self.assertIs(await call.code(), code)


class AccessLogTest(Case):
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.channel = await self.at_socket()

    def message(self, count: int, status: int = 500) -> bytes:
        message = als_pb2.StreamAccessLogsMessage()
        for _ in range(count):
            entry = message.http_logs.log_entry.add()
            address = entry.common_properties.upstream_remote_address.socket_address
            address.address, address.port_value = "10.0.0.1", 8000
            entry.response.response_code.value = status
            entry.request.request_headers[names.ID] = "id-1"
        return bytes(message.SerializeToString())

    def open(self) -> Any:
        return self.channel.stream_unary(f"/{access_log.SERVICE}/StreamAccessLogs")()

    async def until_told(self, count: int) -> None:
        async def told() -> bool:
            return len(self.attempts) == count

        await until(told)

    async def test_attempts_are_told_as_they_come(self) -> None:
        call = self.open()
        for count, (status, failure) in enumerate(((500, Failure.STATUS), (0, Failure.LEFT)), 1):
            await call.write(self.message(1, status))
            await self.until_told(count)
            expected = FailedAttempt("10.0.0.1:8000", failure, "id-1", status=status)
            self.assertEqual(self.attempts[-1], expected)
        await call.write(self.message(MAX_ENTRIES))
        await self.until_told(2 + MAX_ENTRIES)
        await call.done_writing()
        self.assertEqual(await call, b"")

    async def test_what_is_no_message_or_too_much_ends_the_stream(self) -> None:
        for data, code in (
            (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (b"\0" * (MAX_MESSAGE_BYTES + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
            (self.message(MAX_ENTRIES + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with self.subTest(code=code), self.assertLogs("vllm_pd_scheduler", "WARNING"):
                call = self.open()
                await call.write(data)
                async with asyncio.timeout(HUNG_S):
                    self.assertIs(await call.code(), code)
        self.assertEqual(self.attempts, [])


if __name__ == "__main__":
    unittest.main()
