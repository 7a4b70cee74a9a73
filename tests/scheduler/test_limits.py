"""When an instance has enough to do."""

import unittest
from typing import Any

from tests.support.fleet import prompt, scheduler_of
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot
from vllm_pd_scheduler.scheduler import Scheduler

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class SaturationTest(unittest.TestCase):
    def start(self, **limits: Any) -> None:
        self.scheduler = scheduler_of(1, 3, **limits)
        self.registry = self.scheduler.registry
        self.d0, self.d1, self.d2 = self.registry.endpoints(D)

    def scrape(self, endpoint: Endpoint, **metrics: Any) -> None:
        self.registry.scraped(endpoint, MetricsSnapshot(0.0, **metrics), endpoint.in_flight, endpoint.tokens)

    def picked(self) -> set[str]:
        return {endpoint.id for endpoint in self.scheduler.pick(D, prompt(), count=3)}

    def test_each_limit(self) -> None:
        self.start(max_waiting=2)
        for waiting, saturated in ((1.0, False), (2.0, True)):
            self.scrape(self.d0, waiting=waiting)
            self.assertIs(self.scheduler.limits.saturated(self.d0, 0.0), saturated)
        self.start(max_in_flight_tokens=2000)
        for saturated in (False, True):
            self.registry.work.reserve(self.d0, prompt())
            self.assertIs(self.scheduler.limits.saturated(self.d0, 0.0), saturated)
        self.start(max_kv_usage=0.5)
        for usage, saturated in ((0.49, False), (0.5, True)):
            self.scrape(self.d0, kv_usage=usage)
            self.assertIs(self.scheduler.limits.saturated(self.d0, 0.0), saturated)

    def test_what_was_sent_since_the_scrape_fills_the_cache_too(self) -> None:
        self.start(max_kv_usage=0.5)
        self.scrape(self.d0, kv_usage=0.1, kv_capacity=4000.0)
        self.assertFalse(self.scheduler.limits.saturated(self.d0, 0.0))
        self.registry.work.reserve(self.d0, prompt(1600.0))  # and 100 of the answer, and the 400 of others
        self.assertTrue(self.scheduler.limits.saturated(self.d0, 0.0))

    def test_saturated_ones_are_left_out_as_long_as_there_are_others(self) -> None:
        self.start(max_waiting=1)
        self.assertEqual(self.picked(), {"d0", "d1", "d2"})
        self.scrape(self.d0, waiting=5.0)
        self.assertEqual((self.picked(), self.scheduler.has_room(D, 0.0)), ({"d1", "d2"}, True))
        for endpoint in (self.d1, self.d2):
            self.scrape(endpoint, waiting=5.0)
        self.assertEqual((self.picked(), self.scheduler.has_room(D, 0.0)), ({"d0", "d1", "d2"}, False))
        for endpoint in (self.d0, self.d1, self.d2):
            self.registry.drain(endpoint.id)
        self.assertTrue(self.scheduler.has_room(D, 0.0), "there is nothing to wait for")

    def test_one_that_has_said_so_is_until_its_pause_is_over(self) -> None:
        self.start()
        self.registry.ends.overloaded(self.d0, 10.0, retry_after=3.0)
        for now, saturated in ((10.0, True), (12.9, True), (13.0, False)):
            self.assertIs(self.scheduler.limits.saturated(self.d0, now), saturated)
        for endpoint in self.registry.endpoints(D):
            self.registry.ends.overloaded(endpoint, 20.0)
        self.assertFalse(self.scheduler.has_room(D, 20.0))
        self.assertTrue(self.scheduler.has_room(D, 21.0))

    def test_without_limits_nobody_is_saturated(self) -> None:
        self.start()
        for endpoint in (self.d0, self.d1, self.d2):
            self.scrape(endpoint, waiting=1e6, kv_usage=1.0)
        self.assertTrue(self.scheduler.has_room(D, 0.0))
        self.assertFalse(self.scheduler.limits.saturated(self.d0, 0.0))

    def test_what_a_decode_instance_got_since_its_scrape_waits_only_if_others_do(self) -> None:
        registry = scheduler_of(3, 3).registry
        scheduler = Scheduler(SchedulerConfig(max_waiting=1), registry)
        for role, alone in ((P, True), (D, False)):
            for endpoint in registry.endpoints(role):
                self.assertFalse(scheduler.limits.saturated(endpoint, 0.0))
                registry.work.reserve(endpoint)
                self.assertIs(scheduler.limits.saturated(endpoint, 0.0), alone)
                registry.scraped(endpoint, MetricsSnapshot(0.0, running=1.0), 1)
                self.assertFalse(scheduler.limits.saturated(endpoint, 0.0))
                registry.scraped(endpoint, MetricsSnapshot(0.0, waiting=1.0), 1)
                self.assertTrue(scheduler.limits.saturated(endpoint, 0.0))
