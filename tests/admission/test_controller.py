"""The admission controller: waiting in an event loop, and leaving while one waits."""

import asyncio
import unittest
from typing import Any

from tests.support.fleet import P, prompt, scheduler_of
from tests.support.given import give
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.admission.controller import AdmissionController
from vllm_pd_scheduler.admission.dispatcher import NEARLY_FREE_S, Dispatcher
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.request.errors import Reject


class AdmissionControllerTest(unittest.IsolatedAsyncioTestCase):
    def start(self, **config: Any) -> None:
        scheduler = scheduler_of(1, 1, **config)
        self.p0 = scheduler.registry.get("p0")
        self.dispatcher = Dispatcher(scheduler)
        self.clock = asyncio.get_running_loop().time
        self.controller = AdmissionController(self.dispatcher, self.clock)
        self.registry = scheduler.registry

    def enter(self, tokens: float = 1000.0) -> "asyncio.Task[Any]":
        ticket = Ticket(prompt(tokens, arrived=self.clock()), P)
        return asyncio.ensure_future(self.controller.admit(ticket))

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def test_at_once(self) -> None:
        self.start()
        outcome = await self.enter()
        self.assertIsInstance(outcome, Reservation)
        self.assertEqual(self.p0.in_flight, 1)

    async def test_when_one_ends_the_next_is_let_in(self) -> None:
        self.start(max_waiting=1)
        first = await self.enter()
        tasks = [self.enter() for _ in range(3)]
        await self.settle()
        self.assertEqual([task.done() for task in tasks], [False] * 3)
        for task in tasks:
            first.release(self.clock())
            self.controller.wake()
            first = await task
        self.assertEqual((self.p0.in_flight, len(self.dispatcher.queue)), (1, 0))

    async def test_who_leaves_is_out_of_the_queue(self) -> None:
        self.start(max_waiting=1)
        await self.enter()
        waiting = self.enter()
        await self.settle()
        self.assertEqual(len(self.dispatcher.queue), 1)
        waiting.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await waiting
        self.assertEqual((len(self.dispatcher.queue), self.p0.in_flight), (0, 1))

    async def test_who_leaves_as_it_is_let_in_gives_its_place_to_the_next(self) -> None:
        self.start(max_waiting=1)
        first = await self.enter()
        leaving, following = self.enter(), self.enter()
        await self.settle()
        first.release(self.clock())
        self.controller.wake()  # it has the place, and its task has not run yet
        self.assertEqual((self.p0.in_flight, len(self.dispatcher.queue)), (1, 1))
        leaving.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await leaving
        outcome = await following
        self.assertIsInstance(outcome, Reservation)
        self.assertEqual((self.p0.in_flight, len(self.dispatcher.queue)), (1, 0))
        outcome.release(self.clock())
        self.assertEqual((self.p0.in_flight, self.p0.prefill.queued), (0, 0.0))

    async def test_a_timer_lets_in_what_waits_for_the_time_only(self) -> None:
        self.start(late_binding=True, strategy="predicted_latency")
        give(self.p0.prefill, overhead=0.0)  # nothing is gained by sharing a step
        request = prompt(5000.0, now=self.clock())
        self.registry.work.reserve(self.p0, request)
        self.assertGreater(self.p0.prefill.remaining(self.clock()), NEARLY_FREE_S)
        task = self.enter()
        await self.settle()
        self.assertFalse(task.done())
        async with asyncio.timeout(HUNG_S):
            self.assertIsInstance(await task, Reservation)
        self.assertEqual(self.p0.in_flight, 2)

    async def test_a_timer_refuses_who_waits_too_long(self) -> None:
        self.start(max_waiting=1, queue_timeout=0.02)
        await self.enter()
        async with asyncio.timeout(HUNG_S):
            outcome = await self.enter()
        self.assertIsInstance(outcome, Reject)
        self.assertEqual((outcome.status, outcome.reason), (429, "queue_timeout"))

    async def test_no_timer_is_left_behind(self) -> None:
        self.start(max_waiting=1)
        first = await self.enter()
        waiting = self.enter()
        await self.settle()
        self.assertIsNotNone(self.controller._timer)
        first.release(self.clock())
        self.controller.wake()
        await waiting
        self.assertIsNone(self.controller._timer)


if __name__ == "__main__":
    unittest.main()
