"""Requests that every instance answers 500: they are no reason to take an instance out."""

from __future__ import annotations

from tests.support.in_flight import InFlightCase
from tests.support.routing import answer
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.routing.attempts import Failure

ERROR = b'{"error": {"message": "an unpaired surrogate"}}'


class BadRequestsTest(InFlightCase):
    def out(self) -> list[Endpoint]:
        return [e for e in self.router.registry if e.breaker.state is not BreakerState.CLOSED]

    async def test_at_decode(self) -> None:
        for number in range(40):
            forward = await self.forward(prompt=f"prompt {number}")
            self.told(forward, Failure.STATUS)
            self.told(forward, Failure.STATUS, 1)
            forward.release()
            self.wait(1.0)
        self.assertEqual(self.out(), [])

    async def test_at_prefill_and_decode(self) -> None:
        self.leg.answers = {f"p{number}": answer(500, ERROR) for number in range(4)}
        for number in range(40):
            forward = await self.forward(prompt=f"prompt {number}")
            self.assertIsNone(forward.prefill)
            self.told(forward, Failure.STATUS)
            forward.release()
            self.wait(1.0)
        self.assertEqual(self.out(), [])

    async def test_many_at_once(self) -> None:
        """The first failures of all count before any second one: who was ejected for them comes back."""
        waiting = [await self.forward(prompt=f"prompt {number}") for number in range(40)]
        for forward in waiting:
            self.told(forward, Failure.STATUS)
        self.assertEqual(len(self.out()), 2, "no more than half")
        for forward in waiting:
            self.told(forward, Failure.STATUS, 1)
            forward.release()
        self.assertEqual([e for e in self.out() if e.breaker.state is BreakerState.OPEN], [])

    async def test_an_instance_whose_requests_others_serve_is_ejected(self) -> None:
        d0 = self.router.registry.get("d0")
        while d0.breaker.state is BreakerState.CLOSED:
            forward = await self.forward()
            if forward.decode[0] is d0:
                self.told(forward, Failure.STATUS)
            forward.release()
            self.wait(1.0)
        self.assertEqual(self.out(), [d0])
