"""A router of four P and four D with a clock of its own, for tests of requests that are with decode."""

from __future__ import annotations

import json
import unittest
from collections.abc import Callable
from typing import Any

from tests.support.routing import BODY, Leg
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.models import PD_ROLES, PDInstance
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.forward import Forward


class InFlightCase(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.now = 100.0
        self.leg = Leg()
        self.router = self.start()

    def start(self, name: str = "", **config: Any) -> PDRouter:
        settings = SchedulerConfig(**{"strategy": "round_robin", **config})
        self.timers: list[tuple[float, Callable[[], None]]] = []
        router = PDRouter(settings, prefill_leg=self.leg, clock=lambda: self.now, later=self.later, name=name)
        for number in range(4):
            for role in PD_ROLES:
                name = f"{role[0]}{number}"
                router.register_instance(PDInstance(name, role, f"10.0.0.{number + 1}", 8000))
        for endpoint in router.registry:
            router.registry.probed(endpoint, None)
        self.freed: list[PendingHandoff] = []
        router.in_flight.handoffs.release = self.freed.append
        return router

    def later(self, delay: float, call: Callable[[], None]) -> None:
        self.timers.append((self.now + delay, call))

    def wait(self, seconds: float) -> None:
        """Let time pass, and what was to be called in it be called."""
        end = self.now + seconds
        while due := [each for each in self.timers if each[0] <= end]:
            first = min(due, key=lambda each: each[0])
            self.timers.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = end

    async def forward(self, request_id: str = "", **body: Any) -> Forward:
        raw = json.dumps({**BODY, **body}).encode()
        headers = {":method": "POST", ":path": "/v1/completions", "x-request-id": request_id}
        outcome = await self.router.route(headers, raw)
        assert isinstance(outcome, Forward), outcome
        return outcome

    def told(self, forward: Forward, failure: Failure, number: int = 0) -> None:
        address = str(forward.decode[number].address)
        status = {Failure.STATUS: 500, Failure.OVERLOADED: 503, Failure.REFUSED: 400}.get(failure, 0)
        attempt = FailedAttempt(address, failure, forward.id, number == 0, status)
        self.router.in_flight.attempt_failed(attempt)

    def in_flight(self) -> dict[str, int]:
        return {e.id: e.in_flight for e in self.router.registry if e.in_flight}
