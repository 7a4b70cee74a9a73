"""A gateway's call: what is learned of its answer."""

import unittest
from dataclasses import replace
from typing import Any

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tests.support.waiting import until
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.rpc import StatusCode
from vllm_pd_scheduler.telemetry import Ending

from .gateway import BODY, FULL, Case, FakeCall, body, first, head, token

RESET_BEFORE = b"upstream connect error or disconnect/reset before headers. reset reason: "


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
