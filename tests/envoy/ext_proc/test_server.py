"""The ext_proc service: what becomes of a hand-off when a call ends, and what ends one."""

import asyncio
import gc
import json
import unittest
from typing import Any
from unittest import mock

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tests.support import ext_proc as fleet
from tests.support.rpc import served
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.envoy.ext_proc import exchange as exchange_module
from vllm_pd_scheduler.envoy.ext_proc.messages import SERVICE
from vllm_pd_scheduler.envoy.ext_proc.server import ExtProcService
from vllm_pd_scheduler.envoy.ext_proc.stream import Stream
from vllm_pd_scheduler.envoy.limits import MAX_MESSAGE_BYTES
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.request.headers import ENVOY_CONFIG_VERSION
from vllm_pd_scheduler.rpc import Call, StatusCode

LOG = "vllm_pd_scheduler.envoy.ext_proc.exchange"


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


class FakeCall:
    """A call whose client sends a request, and whose answers are known to be out when the test says."""

    def __init__(self) -> None:
        self.exchange: Any = None
        self.messages = [headers_message(), body_message()]
        self.written: list[pb.ProcessingResponse] = []
        self.goes_at_once = True
        self.status: StatusCode | None = None

    def metadata(self, _: str) -> str:
        return ENVOY_CONFIG_VERSION

    def next(self) -> None:
        if self.exchange is not None and self.messages:
            self.exchange.message(self.messages.pop(0))

    def write(self, *parts: bytes) -> None:
        self.written.append(pb.ProcessingResponse.FromString(b"".join(parts)))
        if self.goes_at_once or len(self.written) < 2:
            self.exchange.written()

    def finish(self, code: StatusCode = StatusCode.OK, _: str = "") -> None:
        self.status = code


class Case(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.router = fleet.build()
        self.freed: list[PendingHandoff] = []
        self.router.in_flight.handoffs.release = self.freed.append
        self.service = ExtProcService(self.router)

    def assert_nothing_left(self) -> None:
        self.assertEqual(fleet.in_flight(self.router), 0)
        self.assertEqual(self.service.open_streams, 0)
        self.assertEqual(self.router.body_memory.used, 0)
        self.assertEqual([e.pending_handoffs for e in self.router.registry if e.pending_handoffs], [])


class HandoffTest(Case):
    """Only what certainly was not sent is freed: a D may be using the rest."""

    def start(self, goes_at_once: bool = True) -> FakeCall:
        call = FakeCall()
        call.goes_at_once = goes_at_once
        call.exchange = self.service._open(call)  # type: ignore[arg-type]
        call.next()
        return call

    async def answered(self, call: FakeCall) -> None:
        await until(lambda: len(call.written) == 2)

    async def test_one_that_envoy_got_is_not_freed(self) -> None:
        call = self.start()
        await self.answered(call)
        self.assertEqual(fleet.in_flight(self.router), 1)
        self.assertEqual(self.router.body_memory.used, 0)
        call.exchange.cancelled()
        self.assert_nothing_left()
        self.assertEqual(self.freed, [])

    async def test_one_that_went_out_late_is_not_freed(self) -> None:
        """Envoy's windows had held it back."""
        call = self.start(goes_at_once=False)
        await self.answered(call)
        self.assertGreater(self.router.body_memory.used, 0)
        call.exchange.written()
        self.assertEqual(self.router.body_memory.used, 0)
        call.exchange.cancelled()
        self.assert_nothing_left()
        self.assertEqual(self.freed, [])

    async def test_one_that_did_not_go_out_is_freed(self) -> None:
        call = self.start(goes_at_once=False)
        await self.answered(call)
        call.exchange.cancelled()
        self.assert_nothing_left()
        self.assertEqual(len(self.freed), 1)

    async def test_a_request_that_is_left_while_it_is_routed(self) -> None:
        for turns in range(20):
            call = self.start()
            for _ in range(turns):
                await asyncio.sleep(0)
            call.exchange.cancelled()
            await until(lambda: self.service.open_streams == 0)
            self.assert_nothing_left()
            if len(call.written) == 2:
                break
        else:
            self.fail("none was routed")
        self.assertEqual(self.freed, [])

    async def test_one_whose_answer_could_not_be_written_is_freed(self) -> None:
        broken = mock.patch.object(exchange_module, "encode", side_effect=[(b"",), RuntimeError("a bug")])
        with broken, self.assertLogs(LOG, "ERROR"):
            call = self.start()
            await until(lambda: call.status is not None)
            await until(lambda: self.service.open_streams == 0)
        self.assertIs(call.status, StatusCode.INTERNAL)
        self.assertEqual(len(self.freed), 1)
        self.assert_nothing_left()

    async def test_an_error_has_none_to_free(self) -> None:
        for endpoint in list(self.router.registry):
            self.router.drain_instance(endpoint.id)
        call = self.start()
        await self.answered(call)
        self.assertEqual(call.written[1].WhichOneof("response"), "immediate_response")
        await until(lambda: self.service.open_streams == 0)
        self.assertIs(call.status, StatusCode.OK)
        self.assertEqual(self.freed, [])
        self.assert_nothing_left()

    async def test_the_end_of_an_answer(self) -> None:
        call = self.start()
        await self.answered(call)
        call.exchange.half_closed()
        self.assertIs(call.status, StatusCode.OK)
        self.assert_nothing_left()


class RealCallTest(Case):
    """Over gRPC itself."""

    envoy_config = ENVOY_CONFIG_VERSION

    async def asyncSetUp(self) -> None:
        self.router.config = self.router.config.model_copy(update={"max_body_bytes": 4 << 20})
        self.channel = await self.enterAsyncContext(served(self.service))

    def open(self) -> Any:
        metadata = (("pd-envoy-config", self.envoy_config),)
        return self.channel.stream_stream(f"/{SERVICE}/Process")(metadata=metadata)

    async def no_streams(self) -> None:
        await until(lambda: self.service.open_streams == 0)

    async def test_a_client_that_leaves_while_it_is_routed_is_no_error(self) -> None:
        call = self.open()
        await call.write(headers_message())
        await call.read()
        routed, route = asyncio.Event(), self.router.route

        async def slow(*args: Any) -> Any:
            routed.set()
            await asyncio.sleep(HUNG_S)
            return await route(*args)

        with mock.patch.object(self.router, "route", slow), self.assertNoLogs("vllm_pd_scheduler"):
            await call.write(body_message())
            await routed.wait()
            call.cancel()
            await self.no_streams()
        self.assert_nothing_left()

    async def test_a_large_body_without_room_is_refused_before_it_comes(self) -> None:
        """Its length comes first, and Envoy has not announced it."""
        self.router.body_memory.limit = 1 << 20
        call = self.open()
        await call.write(headers_message())
        await call.read()
        with mock.patch.object(exchange_module, "decode", side_effect=AssertionError("it was read")):
            await call.write(body_message(b" " * (3 << 20)))
            answer = pb.ProcessingResponse.FromString(await call.read())
        self.assertEqual(answer.immediate_response.status.code, 429)
        self.assertIs(await call.code(), grpc.StatusCode.OK)
        await self.no_streams()
        self.assert_nothing_left()

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

    async def test_a_call_that_has_ended_is_gone(self) -> None:
        """Nothing of it waits for the garbage collector."""
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        for _ in range(3):
            call = self.open()
            await call.write(headers_message())
            await call.read()
            await call.write(body_message())
            await call.read()
            await call.done_writing()
            self.assertIs(await call.code(), grpc.StatusCode.OK)
        kinds = (Call, exchange_module.Exchange, Stream)
        self.assertEqual([each for each in gc.get_objects() if isinstance(each, kinds)], [])

    async def test_a_bug_ends_a_call_of_any_size(self) -> None:
        for size in (1, 2 << 20):
            call = self.open()
            await call.write(headers_message())
            await call.read()
            broken = mock.patch.object(exchange_module, "decode", side_effect=RuntimeError("a bug"))
            with broken, self.assertLogs("vllm_pd_scheduler", "ERROR"):
                await call.write(body_message(b" " * size))
                self.assertIs(await call.code(), grpc.StatusCode.INTERNAL)
            await self.no_streams()
            self.assert_nothing_left()

    async def test_a_large_body_is_read(self) -> None:
        call = self.open()
        await call.write(headers_message())
        await call.read()
        await call.write(body_message(json.dumps({"prompt": "p" * (3 << 20)}).encode()))
        answer = pb.ProcessingResponse.FromString(await call.read())
        self.assertGreater(answer.dynamic_metadata["vllm_pd"]["at"], 3 << 20)
        call.cancel()

    async def test_a_wrong_mode_is_not_logged_with_each_request(self) -> None:
        with self.assertLogs("vllm_pd_scheduler.envoy.ext_proc.server", "WARNING") as logs:
            for _ in range(5):
                call = self.open()
                await call.write(body_message())
                await call.code()
        self.assertEqual(len(logs.records), 1)
        self.assertIn("REQUEST_BODY cannot come in state AWAIT_HEADERS", logs.output[0])

    async def test_an_envoy_with_another_configuration_is_told_of_once(self) -> None:
        self.envoy_config = "1"
        with self.assertLogs("vllm_pd_scheduler.envoy.ext_proc.server", "WARNING") as logs:
            for _ in range(5):
                call = self.open()
                await call.write(headers_message())
                await call.read()
                call.cancel()
        self.assertEqual(len(logs.records), 1)
        self.assertIn("envoy/envoy.yaml", logs.output[0])

    async def test_one_that_works_without_results_is_told_of_once_for_all(self) -> None:
        self.envoy_config = "2"
        with self.assertLogs("vllm_pd_scheduler.envoy.ext_proc.server", "WARNING") as logs:
            for _ in range(3):
                self.service._next_complaint = 0.0
                call = self.open()
                await call.write(headers_message())
                await call.read()
                call.cancel()
        self.assertEqual(len(logs.records), 1)
        self.assertIn("earlier version 2: requests are served", logs.output[0])


if __name__ == "__main__":
    unittest.main()
