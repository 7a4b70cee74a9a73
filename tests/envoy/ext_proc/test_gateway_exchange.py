"""A gateway's call: what is kept of a body, what ends it, and what is learned of its answer."""

import asyncio
import json
import unittest
from dataclasses import replace
from typing import Any

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tests.support import ext_proc as fleet
from tests.support.waiting import until
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.envoy.ext_proc.server import ExtProcService
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.rpc import StatusCode
from vllm_pd_scheduler.telemetry import Ending

RESET_BEFORE = b"upstream connect error or disconnect/reset before headers. reset reason: "
BODY = json.dumps({"prompt": "p" * 200}).encode()
FULL = ProcessingMode.FULL_DUPLEX_STREAMED


def first(
    request_mode: Any = FULL, response_mode: Any = FULL, *, end: bool = False, **headers: str
) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    for name, value in {**(fleet.MODELS if end else fleet.COMPLETION), **headers}.items():
        request.request_headers.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    request.request_headers.end_of_stream = end
    if request_mode is not None:
        request.protocol_config.request_body_mode = request_mode
        request.protocol_config.response_body_mode = response_mode
    return request


def body(data: bytes, last: bool = False) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    request.request_body.body, request.request_body.end_of_stream = data, last
    return request


def head(
    status: int = 200, served: str | None = None, own: bool = False, **more: str
) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    headers = {":status": str(status), **({} if own else {"date": "today"}), **more}
    for name, value in headers.items():
        request.response_headers.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    if served is not None:
        fields = request.metadata_context.filter_metadata["envoy.lb"].fields
        fields["x-gateway-destination-endpoint-served"].string_value = served
    return request


def token(data: bytes = b"data: x\n\n", last: bool = False) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    request.response_body.body, request.response_body.end_of_stream = data, last
    return request


class Connection:
    """A gateway's."""


class FakeCall:
    """A call whose messages come as the test sends them, and whose answers go out when it says."""

    def __init__(self, service: ExtProcService, connection: object, version: str | None = None) -> None:
        self.connection = connection
        self.is_connected = True
        self.version = version
        self.asked = False
        self.goes_at_once = True
        self.unwritten = 0
        self.written: list[pb.ProcessingResponse] = []
        self.status: StatusCode | None = None
        self.exchange: Any = None
        self.exchange = service._open(self)  # type: ignore[arg-type]

    def metadata(self, _: str) -> str | None:
        return self.version

    def next(self) -> None:
        self.asked = True

    def send(self, message: pb.ProcessingRequest) -> None:
        assert self.asked, "no message was asked for"
        self.asked = False
        self.exchange.message(message.SerializeToString())

    def write(self, *parts: bytes) -> None:
        self.write_all([parts])

    def write_all(self, messages: Any) -> None:
        self.written += [pb.ProcessingResponse.FromString(b"".join(parts)) for parts in messages]
        self.unwritten += 1
        if self.goes_at_once:
            self.goes_out()

    def goes_out(self) -> None:
        self.unwritten -= 1
        self.exchange.written()

    def finish(self, code: StatusCode = StatusCode.OK, _: str = "") -> None:
        self.status = code

    @property
    def kinds(self) -> list[str | None]:
        return [each.WhichOneof("response") for each in self.written]


class Case(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.router = fleet.build()
        self.freed: list[PendingHandoff] = []
        self.router.in_flight.handoffs.release = self.freed.append
        self.service = ExtProcService(self.router)
        self.connection = Connection()

    def open(self, version: str | None = None) -> FakeCall:
        return FakeCall(self.service, self.connection, version)

    async def routed(self, call: FakeCall, *messages: pb.ProcessingRequest) -> None:
        """Send a request, and wait for what is answered."""
        for message in messages or (first(), body(BODY), body(b"", True)):
            call.send(message)
        await until(lambda: call.written)

    def assert_nothing_left(self) -> None:
        self.assertEqual(fleet.in_flight(self.router), 0)
        self.assertEqual(self.service.open_streams, 0)
        self.assertEqual(self.router.body_memory.used, 0)

    @property
    def decision(self) -> Any:
        return next(iter(self.router.decisions.after(self.router.decisions.newest - 1)))

    def failures(self) -> dict[str, float]:
        """Failed attempts by kind."""
        found: dict[str, float] = {}
        for metric in self.router.telemetry.prometheus.collect():
            for sample in metric.samples:
                if sample.name == "pd_scheduler_decode_attempt_failures_total":
                    found[sample.labels["failure"]] = found.get(sample.labels["failure"], 0) + sample.value
        return found


class RequestTest(Case):
    async def test_a_request_and_its_answer(self) -> None:
        call = self.open()
        await self.routed(call)
        self.assertEqual(call.kinds, ["request_headers", "request_body"])
        self.assertEqual(self.router.body_memory.used, 0, "the gateway has it")
        self.assertEqual(fleet.in_flight(self.router), 1)
        for message in (head(), token(), token(), token(b"", True)):
            call.send(message)
        self.assertEqual(call.kinds[2:], ["response_headers"] + ["response_body"] * 3)
        self.assertEqual(fleet.in_flight(self.router), 1, "until the gateway ends the call")
        call.exchange.half_closed()
        self.assert_nothing_left()
        self.assertEqual(self.freed, [])
        self.assertEqual(self.failures(), {})

    async def test_the_mode_that_is_not_told(self) -> None:
        """Our own Envoy says which configuration it has; others that do not tell their mode are gateways."""
        ours, gateway = self.open("3"), self.open(None)
        for call in (ours, gateway):
            call.send(first(None))
        self.assertEqual((ours.kinds, gateway.kinds), (["request_headers"], []))
        with self.assertNoLogs("vllm_pd_scheduler", "WARNING"):
            self.open(None).send(first())
        with self.assertLogs("vllm_pd_scheduler", "WARNING"):
            self.open(None).send(first(ProcessingMode.BUFFERED))

    async def test_a_body_is_accounted_as_it_comes(self) -> None:
        call = self.open()
        call.send(first(content_length="1000000"))
        self.assertEqual(self.router.body_memory.used, 0, "a client may send it slowly")
        for number in range(1, 4):
            call.send(body(b"x" * 1000))
            self.assertEqual(self.router.body_memory.used, 1000 * number)
        call.exchange.cancelled()
        self.assert_nothing_left()

    async def test_a_body_that_is_too_large(self) -> None:
        self.router.body_memory.resize(5000, 2500)
        announced, sent = self.open(), self.open()
        announced.send(first(content_length="2501"))
        sent.send(first())
        for _ in range(3):
            sent.send(body(b"x" * 1000))
        for call in (announced, sent):
            (answer,) = call.written
            self.assertEqual(answer.immediate_response.status.code, 413)
            self.assertIs(call.status, StatusCode.OK)
        self.assert_nothing_left()

    async def test_more_bodies_than_there_is_room_for(self) -> None:
        self.router.body_memory.resize(5000, 2500)
        calls = [self.open() for _ in range(3)]
        for call in calls:
            call.send(first())
            call.send(body(b"x" * 2000))
        self.assertEqual(calls[2].written[0].immediate_response.status.code, 429)
        self.assertEqual([call.written for call in calls[:2]], [[], []])
        for call in calls[:2]:
            call.exchange.cancelled()
        self.assert_nothing_left()

    async def test_a_part_that_is_announced_by_its_message(self) -> None:
        self.router.body_memory.resize(1 << 20, 1 << 19)
        call = self.open()
        call.send(first())
        call.send(body(b"x" * (1 << 18)))
        self.assertTrue(call.exchange.accepts(1 << 18))
        self.assertEqual(self.router.body_memory.used, 1 << 19)
        other = self.open()
        other.send(first())
        self.router.body_memory.resize(1 << 19, 1 << 19)
        self.assertFalse(other.exchange.accepts(1 << 18))
        self.assertEqual(other.written[0].immediate_response.status.code, 429)

    async def test_a_part_that_is_larger_than_any_body(self) -> None:
        self.router.body_memory.resize(1 << 20, 1 << 18)
        call = self.open()
        call.send(first())
        self.assertFalse(call.exchange.accepts(2 << 20))
        self.assertEqual(call.written[0].immediate_response.status.code, 413)
        self.assert_nothing_left()

    async def test_a_part_of_an_answer_for_which_there_is_no_room(self) -> None:
        """Nothing can be answered in its place any more."""
        call = self.open()
        await self.routed(call)
        call.send(head())
        self.router.body_memory.resize(1 << 17, 1 << 17)
        self.assertTrue(call.exchange.accepts(1 << 17))
        call.send(token(b"x" * (1 << 17)))
        self.assertEqual(call.kinds[3:], ["response_body"] * 3)
        self.assertEqual(self.router.body_memory.used, 0)
        self.router.body_memory.used = 1 << 17
        self.assertFalse(call.exchange.accepts(1 << 17))
        self.assertEqual(len(call.kinds), 6)

    async def test_a_client_that_leaves_while_it_is_routed(self) -> None:
        for leave in ("half_closed", "cancelled"):
            call = self.open()
            for message in (first(), body(BODY, True)):
                call.send(message)
            self.assertTrue(call.asked, "whether it leaves must be seen")
            getattr(call.exchange, leave)()
            await until(lambda: self.service.open_streams == 0)
            self.assertEqual(call.written, [])
            self.assert_nothing_left()

    async def test_the_end_of_a_body_that_comes_twice(self) -> None:
        call = self.open()
        await self.routed(call, first(), body(BODY, True), body(b"", True))
        self.assertEqual(call.kinds, ["request_headers", "request_body"])
        call.send(body(b"", True))
        call.send(head())
        self.assertEqual(call.kinds[2:], ["response_headers"])

    async def test_an_answer_that_comes_before_all_is_written(self) -> None:
        """D may answer a body that it has not read."""
        call = self.open()
        call.goes_at_once = False
        await self.routed(call)
        call.send(head(400))
        self.assertEqual(call.kinds, ["request_headers", "request_body"])
        call.goes_at_once = True
        call.goes_out()
        self.assertEqual(call.kinds[2:], ["response_headers"])
        self.assertEqual(self.failures(), {"refused": 1})

    async def test_one_that_did_not_go_out_is_freed(self) -> None:
        call = self.open()
        call.goes_at_once = False
        await self.routed(call)
        call.exchange.half_closed()
        self.assert_nothing_left()
        self.assertEqual(len(self.freed), 1)

    async def test_a_request_without_a_body(self) -> None:
        call = self.open()
        await self.routed(call, first(end=True))
        self.assertEqual(call.kinds, ["request_headers"])

    async def test_a_websocket(self) -> None:
        """Its body would be waited for as long as the client waits for the answer."""
        socket = {"upgrade": "WebSocket", ":method": "GET", ":path": "/v1/realtime"}
        call = self.open()
        call.send(first(**socket))
        self.assertEqual(call.written[0].immediate_response.status.code, 501)
        self.assertIs(call.status, StatusCode.OK)
        headers_alone = self.open()
        await self.routed(headers_alone, first(ProcessingMode.NONE, **socket))
        self.assertEqual(headers_alone.kinds, ["request_headers"])
        headers_alone.exchange.half_closed()
        self.assert_nothing_left()

    async def test_a_message_that_cannot_come(self) -> None:
        call = self.open()
        call.send(first())
        with self.assertLogs("vllm_pd_scheduler", "WARNING"):
            call.send(head())
        self.assertIs(call.status, StatusCode.INVALID_ARGUMENT)
        self.assert_nothing_left()

    async def test_one_that_cannot_come_while_it_is_routed(self) -> None:
        """Nothing goes on with the request, whether that has begun or not; a stream is counted once."""
        held, prefilled = asyncio.Event(), 0

        async def slow(*leg: Any) -> Any:
            nonlocal prefilled
            prefilled += 1
            await held.wait()
            return await fleet.prefill(*leg)

        self.router.prefill_leg = slow
        for begun in (False, True):
            call = self.open()
            for message in (first(), body(BODY, True)):
                call.send(message)
            if begun:
                await until(lambda: prefilled)
            with self.assertLogs("vllm_pd_scheduler", "WARNING"):
                self.service._next_complaint = 0.0
                call.send(head())
            self.assertIs(call.status, StatusCode.INVALID_ARGUMENT)
            await until(call.exchange._task.done)
            self.assertEqual(prefilled, int(begun))
            self.assertEqual(call.written, [])
            self.assert_nothing_left()
        self.assertTrue(self.service._idle.is_set())


class AnswerTest(Case):
    async def sent(self, response_mode: Any = FULL) -> FakeCall:
        call = self.open()
        await self.routed(call, first(FULL, response_mode), body(BODY, True))
        return call

    def told(self, call: FakeCall) -> tuple[Ending | None, dict[str, float], int]:
        """End a call as a gateway does; return what was learned, and how many hand-offs are free."""
        if call.status is None:
            call.exchange.half_closed()
        self.assert_nothing_left()
        return self.decision.ending, self.failures(), len(self.freed)

    async def test_what_a_status_means(self) -> None:
        for status, ending, failure in (
            (400, Ending.CLIENT_ERROR, "refused"),
            (404, Ending.CLIENT_ERROR, "refused"),
            (429, Ending.CLIENT_ERROR, "overloaded"),
            (500, Ending.ERROR, "status"),
            (503, Ending.ERROR, "overloaded"),
        ):
            with self.subTest(status):
                self.setUp()
                call = await self.sent()
                for message in (head(status), token(b"no", True)):
                    call.send(message)
                self.assertEqual(self.told(call), (ending, {failure: 1}, 1))

    async def test_what_the_gateway_says_itself(self) -> None:
        for words, failure, freed in (
            (
                RESET_BEFORE + b"connection termination",
                "reset",
                1,
            ),
            (
                RESET_BEFORE + b"remote connection failure, transport failure reason: delayed connect",
                "connect",
                1,
            ),
            (b"upstream request timeout", "timeout", 0),
            (b"something else", "overloaded", 1),
            (b"", "overloaded", 1),
        ):
            with self.subTest(words):
                self.setUp()
                call = await self.sent()
                call.send(head(503, own=True))
                call.send(token(words, True))
                self.assertEqual(self.told(call), (Ending.ERROR, {failure: 1}, freed))

    async def test_a_gateway_that_knows_no_host(self) -> None:
        call = await self.sent()
        call.send(head(503, own=True))
        call.send(token(b"no healthy upstream", True))
        self.assertEqual(self.told(call), (Ending.ERROR, {}, 1))

    async def test_a_client_that_leaves_after_the_headers(self) -> None:
        call = await self.sent()
        call.send(head())
        self.assertEqual(self.told(call), (Ending.LEFT, {"abandoned": 1}, 0))

    async def test_an_answer_that_breaks_off(self) -> None:
        call = await self.sent()
        call.send(head())
        call.send(token())
        self.assertEqual(self.told(call), (Ending.LEFT, {"broken_off": 1}, 0))

    async def test_trailers_end_an_answer(self) -> None:
        call = await self.sent()
        trailers = pb.ProcessingRequest()
        trailers.response_trailers.SetInParent()
        for message in (head(), token(), trailers):
            call.send(message)
        self.assertEqual(call.kinds[-1], "response_trailers")
        self.assertEqual(self.told(call), (Ending.OK, {}, 0))

    async def test_an_answer_whose_body_does_not_come_here(self) -> None:
        call = await self.sent(ProcessingMode.NONE)
        call.send(head())
        self.assertEqual(self.told(call), (Ending.OK, {}, 0))

    async def test_a_gateway_that_is_lost(self) -> None:
        """Its D may be using the hand-off."""
        call = await self.sent()
        call.is_connected = False
        call.exchange.cancelled()
        self.assert_nothing_left()
        self.assertEqual((self.failures(), self.freed), ({}, []))

    async def test_a_gateway_that_tells_nothing_of_answers(self) -> None:
        """Some end the call when they know where the request goes."""
        call = self.open()
        await self.routed(call, first(None), body(BODY, True))
        self.assertEqual(self.told(call), (None, {}, 0))
        # One of its kind that has told once is believed.
        before = self.open()
        await self.routed(before, first(None), body(BODY, True))
        before.send(head(400))
        self.assertEqual(self.told(before), (Ending.CLIENT_ERROR, {"refused": 1}, 1))
        call = self.open()
        await self.routed(call, first(None), body(BODY, True))
        self.assertEqual(self.told(call)[:2], (Ending.LEFT, {"refused": 1, "left": 1}))

    async def test_who_has_served(self) -> None:
        self.router.prefill_leg = None  # no hand-off
        call = await self.sent()
        self.assertNotIn(",", self.destination(call))
        call.send(head(served="10.0.0.1:80"))
        call.send(token(b"x", True))
        self.told(call)
        call = await self.sent()
        self.assertIn(",", self.destination(call), "this gateway takes a list")
        one, other = self.destination(call).split(",")
        call.send(head(served=other))
        self.assertEqual(self.in_flight_at(other), 1)
        self.assertEqual(self.in_flight_at(one), 0)
        self.assertEqual(self.failures(), {"passed_over": 1})
        found = call.written[-1].response_headers.response.header_mutation.set_headers
        served = self.router.registry.at(InstanceRole.DECODE, other)
        assert served is not None
        self.assertEqual([each.header.raw_value.decode() for each in found], [served.id])

    async def test_one_that_the_gateway_has_chosen_itself(self) -> None:
        call = await self.sent()
        (chosen,) = {"10.0.0.1:80", "10.0.0.1:81"} - {self.destination(call)}
        call.send(head(served=chosen))
        self.assertEqual(self.in_flight_at(chosen), 1)
        call.send(token(b"x", True))
        self.assertEqual(self.told(call), (Ending.OK, {}, 0))
        self.assertEqual(self.decision.answered_by, "d1")

    async def test_one_that_cannot_use_the_hand_off(self) -> None:
        """The gateway does not know the one that was named any more, and its fallback policy has chosen."""
        self.tell_revisions_apart()
        for leg in ("scheduler", "sidecar"):
            self.router.config.__dict__["prefill_leg"] = leg
            call = await self.sent()
            self.assertEqual(self.destination(call), "10.0.0.1:80")
            call.send(head(served="10.0.0.1:81"))
            answer = call.written[-1].immediate_response
            self.assertEqual(answer.status.code, 503)
            self.assertEqual(answer.details, "pd_handoff_misdirected")
            self.assertEqual(self.told(call), (Ending.ERROR, {}, 0))

    async def test_one_that_cannot_use_it_may_refuse(self) -> None:
        self.tell_revisions_apart()
        call = await self.sent()
        call.send(head(404, served="10.0.0.1:81"))
        self.assertEqual(call.kinds[-1], "response_headers")
        self.assertEqual(self.told(call), (Ending.CLIENT_ERROR, {"refused": 1}, 1))

    async def test_a_sidecar_of_another_revision_is_no_fallback(self) -> None:
        self.router.config.__dict__["prefill_leg"] = "sidecar"
        self.service.told_answer(self.connection, True)
        call = await self.sent()
        self.assertIn(",", self.destination(call))
        call.exchange.half_closed()
        self.tell_revisions_apart()
        call = await self.sent()
        self.assertEqual(self.destination(call), "10.0.0.1:80")
        call.exchange.half_closed()

    async def test_a_hand_off_that_was_sent_twice(self) -> None:
        call = await self.sent()
        call.send(head(**{"x-envoy-attempt-count": "2"}))
        self.assertEqual(call.written[-1].immediate_response.status.code, 503)
        self.assertIs(call.status, StatusCode.OK)
        self.assertEqual(self.told(call), (Ending.ERROR, {}, 0))

    async def test_an_answer_that_does_not_begin_in_time(self) -> None:
        self.take_at_most(0.01)
        call = await self.sent()
        await until(lambda: call.status is not None)
        self.assertEqual(call.written[-1].immediate_response.status.code, 504)
        self.assertEqual(self.told(call), (Ending.ERROR, {"timeout": 1}, 0))

    async def test_one_that_begins_in_time_may_go_on(self) -> None:
        call = await self.sent()
        self.assertIsNotNone(call.exchange._timer)
        call.send(head())
        self.assertIsNone(call.exchange._timer)

    def tell_revisions_apart(self) -> None:
        """Give P and the first D one revision, the other D another one."""
        for name, revision in (("p0", "a"), ("d0", "a"), ("d1", "b")):
            instance = replace(self.router.registry.get(name).instance, revision=revision)
            self.router.registry.describe(name, instance)

    def take_at_most(self, seconds: float) -> None:
        """Limit how long a D may take to its first byte."""
        limits = SchedulerConfig(decode_first_byte_timeout=seconds, decode_seconds_per_token=0.0)
        self.router.config.take(limits, ["decode_first_byte_timeout", "decode_seconds_per_token"])

    def destination(self, call: FakeCall) -> str:
        mutation = call.written[0].request_headers.response.header_mutation
        found = {each.header.key: each.header.raw_value.decode() for each in mutation.set_headers}
        return found["x-gateway-destination-endpoint"]

    def in_flight_at(self, address: str) -> int:
        endpoint = self.router.registry.at(InstanceRole.DECODE, address)
        assert endpoint is not None
        return endpoint.in_flight


if __name__ == "__main__":
    unittest.main()
