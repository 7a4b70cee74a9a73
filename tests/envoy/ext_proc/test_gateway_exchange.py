"""A gateway's call: what is kept of a request's body, and what ends it."""

import asyncio
import unittest
from typing import Any

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode

from tests.support import ext_proc as fleet
from tests.support.waiting import until
from vllm_pd_scheduler.rpc import StatusCode

from .gateway import BODY, Case, body, first, head, token


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


if __name__ == "__main__":
    unittest.main()
