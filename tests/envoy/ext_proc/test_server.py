"""The gRPC shell: what becomes of a hand-off when the call ends around the answer, and what ends a call."""

import asyncio
import json
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tests.support import ext_proc as fleet
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.envoy.ext_proc import server as server_module
from vllm_pd_scheduler.envoy.ext_proc.messages import SERVICE
from vllm_pd_scheduler.envoy.ext_proc.server import ExtProcService
from vllm_pd_scheduler.envoy.grpc_server import create_server
from vllm_pd_scheduler.envoy.limits import MAX_MESSAGE_BYTES
from vllm_pd_scheduler.handoff.pending import PendingHandoff

LOG = "vllm_pd_scheduler.envoy.ext_proc.server"


def headers_message(**more: str) -> bytes:
    request = pb.ProcessingRequest()
    for name, value in {**fleet.COMPLETION, **more}.items():
        request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    return bytes(request.SerializeToString())


def body_message(body: bytes = json.dumps({"prompt": "p"}).encode()) -> bytes:
    request = pb.ProcessingRequest()
    request.request_body.body = body
    request.request_body.end_of_stream = True
    return bytes(request.SerializeToString())


class Context:
    """A call whose client sends a request, and whose second write goes as the test says."""

    def __init__(self, answer_goes: Callable[[], Any] | None = None) -> None:
        self.messages = [headers_message(), body_message()]
        self.written: list[pb.ProcessingResponse] = []
        self.writing = asyncio.Event()
        self.answer_goes = answer_goes
        self.aborted: grpc.StatusCode | None = None

    async def read(self) -> Any:
        if self.messages:
            return self.messages.pop(0)
        await asyncio.Event().wait()

    async def write(self, data: bytes) -> None:
        self.written.append(pb.ProcessingResponse.FromString(data))
        if len(self.written) == 2:
            self.writing.set()
            if self.answer_goes is not None:
                await self.answer_goes()

    async def abort(self, code: grpc.StatusCode, _: str) -> None:
        self.aborted = code
        raise grpc.aio.AbortError

    def cancelled(self) -> bool:
        return False


class Case(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.router = fleet.build()
        self.freed: list[PendingHandoff] = []
        self.router.in_flight.release_handoff = self.freed.append
        self.service = ExtProcService(self.router)

    def start(self, context: Any) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.service._process(None, context))

    async def ended(self, call: asyncio.Task[None]) -> None:
        """Wait for a call's end; nothing of it may be left."""
        async with asyncio.timeout(HUNG_S):
            with self.assertRaises((asyncio.CancelledError, grpc.aio.AbortError)):
                await call
        self.assertEqual(fleet.in_flight(self.router), 0)
        self.assertEqual(self.service.open_streams, 0)
        self.assertEqual(self.router.body_memory.used, 0)
        self.assertEqual([e.pending_handoffs for e in self.router.registry if e.pending_handoffs], [])


class HandoffTest(Case):
    """Only what certainly was not sent is freed: a D may be using the rest."""

    async def test_one_that_envoy_got_is_not_freed(self) -> None:
        context = Context()
        call = self.start(context)
        await context.writing.wait()
        await asyncio.sleep(0)
        self.assertEqual(fleet.in_flight(self.router), 1)
        call.cancel()
        await self.ended(call)
        self.assertEqual(self.freed, [])

    async def test_one_whose_write_went_out_as_the_client_left_is_not_freed(self) -> None:
        went = asyncio.Event()
        context = Context(went.wait)
        call = self.start(context)
        await context.writing.wait()
        call.cancel()
        await asyncio.sleep(0)
        self.assertFalse(call.done(), "it is not known yet")
        self.assertEqual(self.freed, [])
        went.set()
        await self.ended(call)
        self.assertEqual(self.freed, [])

    async def test_one_whose_write_was_done_before_the_cancellation_came(self) -> None:
        """The loop was busy: it learns of both at once."""
        context = Context()
        call = self.start(context)
        await context.writing.wait()
        call.cancel()
        await self.ended(call)
        self.assertEqual(self.freed, [])

    async def test_one_whose_write_failed_is_freed(self) -> None:
        for cancelled in (True, False):
            with self.subTest(cancelled=cancelled), self.assertNoLogs(LOG):
                failed = asyncio.get_running_loop().create_future()
                context = Context(lambda failed=failed: failed)  # type: ignore[misc]
                call = self.start(context)
                await context.writing.wait()
                if cancelled:
                    call.cancel()
                    await asyncio.sleep(0)
                failed.set_exception(grpc.aio.InternalError("Failed to execute_batch"))
                await self.ended(call)
                self.assertEqual(len(self.freed), 1)
                self.freed.clear()

    async def test_one_whose_answer_could_not_be_written_is_freed(self) -> None:
        context = Context()
        broken = mock.patch.object(server_module, "encode", side_effect=[b"", RuntimeError("a bug")])
        with broken, self.assertLogs(LOG, "ERROR"):
            await self.ended(self.start(context))
        self.assertIs(context.aborted, grpc.StatusCode.INTERNAL)
        self.assertEqual(len(self.freed), 1)

    async def test_an_error_has_none_to_free(self) -> None:
        for endpoint in list(self.router.registry):
            self.router.drain_instance(endpoint.id)
        context = Context()
        async with asyncio.timeout(HUNG_S):
            await self.service._process(None, context)
        self.assertEqual(context.written[1].WhichOneof("response"), "immediate_response")
        self.assertEqual(self.freed, [])


class RealCallTest(Case):
    """Over gRPC itself."""

    async def asyncSetUp(self) -> None:
        self.server = create_server([self.service.handler()], max_body_bytes=4 << 20)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)

    async def asyncTearDown(self) -> None:
        await self.channel.close()
        await self.server.stop(None)

    def open(self) -> Any:
        return self.channel.stream_stream(f"/{SERVICE}/Process")()

    async def no_streams(self) -> None:
        async def none() -> bool:
            return self.service.open_streams == 0

        await until(none)

    async def test_a_client_that_leaves_while_the_loop_is_busy_is_no_error(self) -> None:
        """The write is tried on a call that has ended, and what it was about is freed."""
        call = self.open()
        await call.write(headers_message())
        await call.read()
        routed, route = asyncio.Event(), self.router.route

        async def slow(*args: Any) -> Any:
            outcome = await route(*args)
            routed.set()
            await asyncio.sleep(0)
            return outcome

        with mock.patch.object(self.router, "route", slow), self.assertNoLogs(LOG):
            await call.write(body_message())
            await routed.wait()
            call.cancel()
            await self.no_streams()
        self.assertEqual(fleet.in_flight(self.router), 0)

    async def test_what_ends_a_call(self) -> None:
        large = pb.ProcessingRequest()
        for number in range(100_000):
            large.request_headers.headers.headers.add(key=f"x-{number}", raw_value=b"v")
        self.assertGreater(large.ByteSize(), MAX_MESSAGE_BYTES)
        invalid, exhausted = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
        for messages, code in (
            ([b"\xff\xff\xff"], invalid),
            ([b""], invalid),
            ([body_message()], invalid),
            ([headers_message(), headers_message()], invalid),
            ([large.SerializeToString()], exhausted),
            ([headers_message(), large.SerializeToString()], exhausted),
            ([headers_message(), body_message(b" " * (6 << 20))], exhausted),
        ):
            with self.subTest(code=code, last=len(messages[-1])):
                call = self.open()
                for message in messages[:-1]:
                    await call.write(message)
                    await call.read()
                await call.write(messages[-1])
                async with asyncio.timeout(HUNG_S):
                    self.assertIs(await call.code(), code)
                await self.no_streams()
                self.assertEqual(self.router.body_memory.used, 0)

    async def test_a_large_body_is_read(self) -> None:
        call = self.open()
        await call.write(headers_message())
        await call.read()
        await call.write(body_message(json.dumps({"prompt": "p" * (3 << 20)}).encode()))
        answer = pb.ProcessingResponse.FromString(await call.read())
        self.assertGreater(answer.dynamic_metadata["vllm_pd"]["at"], 3 << 20)
        call.cancel()

    async def test_a_wrong_mode_is_not_logged_with_each_request(self) -> None:
        with self.assertLogs(LOG, "WARNING") as logs:
            for _ in range(5):
                call = self.open()
                await call.write(body_message())
                await call.code()
        self.assertEqual(len(logs.records), 1)
        self.assertIn("REQUEST_BODY cannot come in state AWAIT_HEADERS", logs.output[0])


if __name__ == "__main__":
    unittest.main()
