"""Requests whose P and D cannot hand over to each other."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from prometheus_client import generate_latest

from tests.support.in_flight import InFlightCase
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot
from vllm_pd_scheduler.routing.attempts import Failure
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.telemetry import Ending, Served

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class PairsTest(InFlightCase):
    def setUp(self) -> None:
        super().setUp()
        self.router = self.start(strategy="power_of_two", ejection_pause=60.0)

    def endpoints(self, role: InstanceRole) -> list[Endpoint]:
        return self.router.registry.endpoints(role)

    async def test_a_pair_that_fails_is_found_from_what_envoy_tells(self) -> None:
        broken = self.endpoints(P)[0], self.endpoints(D)[0]
        number = 0
        while not list(self.router.registry.pairs.out()):
            number += 1
            for endpoint in self.router.registry:  # it may be taken for broken at first
                self.router.registry.probed(endpoint, None, self.now)
            forward = await self.forward(prompt=f"prompt {number}")
            if (forward.prefill, forward.decode[0]) == broken:
                self.told(forward, Failure.STATUS)
            forward.release()
            self.wait(1.0)
        out = [(p, d) for p, d, _ in self.router.registry.pairs.out()]
        self.assertEqual(out, [broken])
        d0 = broken[1]
        self.router.registry.probed(d0, None, self.now + 60.0)
        self.assertTrue(all(e.routable for e in self.router.registry))
        for number in range(60):
            forward = await self.forward(prompt=f"further {number}")
            self.assertNotEqual((forward.prefill, forward.decode[0]), broken)
            self.assertEqual(forward.served, Served.SPLIT)
            forward.release()

    async def test_without_a_d_for_it_another_p_is_chosen(self) -> None:
        prefill = self.endpoints(P)[0]
        registry = self.router.registry
        for decode in self.endpoints(D)[1:]:
            self.router.drain_instance(decode.id)
        decode = self.endpoints(D)[0]
        for _ in range(3):
            registry.ends.failed(decode, "status", self.now, prefill)
            registry.ends.succeeded(decode, self.endpoints(P)[1])
        for number in range(20):
            forward = await self.forward(prompt=f"prompt {number}")
            self.assertEqual(forward.served, Served.SPLIT)
            self.assertIsNot(forward.prefill, prefill)
            forward.release()

    async def test_with_no_p_left_decode_prefills(self) -> None:
        for prefill in self.endpoints(P)[1:]:
            self.router.drain_instance(prefill.id)
        self.leave_out_all(self.endpoints(P)[0])
        forward = await self.forward()
        self.assertEqual((forward.served, forward.prefill), (Served.LOCAL, None))

    async def test_a_p_that_is_left_out_has_no_room_for_anybody(self) -> None:
        """However idle it is: else all would go to the others, which are full."""
        for revisions in ({}, {"": 1}):
            with self.subTest(revisions):
                self.router = self.start(max_waiting=2, ejection_pause=60.0, revisions=revisions)
                first, *others = self.endpoints(P)
                self.leave_out_all(first)
                taken = [self.router.registry.work.reserve(each) for each in others for _ in range(2)]
                routing = asyncio.ensure_future(self.forward())
                await asyncio.sleep(0)
                self.assertEqual(len(self.router.dispatcher.queue), 1)
                taken[0].release()
                self.router.dispatcher.dispatch(self.now)
                forward = await routing
                self.assertIs(forward.prefill, others[0])
                self.router.drain_instance(first.id)
                for each in taken:
                    each.release()
                forward.release()

    async def test_where_decode_may_not_prefill_it_is_tried_all_the_same(self) -> None:
        self.router = self.start(on_prefill_failure="fail", ejection_pause=60.0)
        for prefill in self.endpoints(P)[1:]:
            self.router.drain_instance(prefill.id)
        self.leave_out_all(self.endpoints(P)[0])
        await self.forward()

    async def test_nothing_is_learned_of_a_d_that_is_another_one_now(self) -> None:
        """It has other ranks, at the same address."""
        forward = await self.forward(stream=True)
        decode = forward.decode[0]
        self.router.unregister_instance(decode.id)
        self.router.register_instance(replace(decode.instance, data_parallel_size=2))
        result = Result(forward.id, Ending.OK, 200, 1.0, 0.5, 0.1, str(decode.address), 9)
        self.router.in_flight.told(result)
        forward.release()
        self.assertEqual(self.router.registry.load.transfers._instances, {})
        shown = generate_latest(self.router.telemetry.prometheus).decode()
        self.assertFalse(f'decode="{decode.id}"' in shown)

    def leave_out_all(self, prefill: Endpoint) -> None:
        """Have all hand-offs of a P fail, at D that serve others."""
        registry = self.router.registry
        for _ in range(3):
            for decode in self.endpoints(D):
                registry.ends.failed(decode, "status", self.now, prefill)
                registry.ends.succeeded(decode)
        self.assertEqual([(p, d) for p, d, _ in registry.pairs.out()], [(prefill, None)])

    async def test_what_a_hand_off_took_is_learned(self) -> None:
        transfers = self.router.registry.load.transfers
        for decode in self.endpoints(D):
            self.router.registry.scraped(decode, MetricsSnapshot(self.now), 0)
        for number in range(3):
            forward = await self.forward(stream=True, prompt=f"prompt {number}")
            self.router.in_flight.told(self.result(forward, ttft=0.3))
            forward.release()
            self.wait(1.0)
        self.assertEqual(transfers.samples, 3)
        forward = await self.forward(prompt="one that comes whole")
        self.router.in_flight.told(self.result(forward, ttft=0.3))
        self.assertEqual(transfers.samples, 3)

    def result(self, forward: Any, ttft: float) -> Result:
        return Result(forward.id, Ending.OK, 200, 1.0, ttft, 0.1, str(forward.decode[0].address))
