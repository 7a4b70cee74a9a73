"""A request that may go to some D only, as a gateway says."""

import unittest

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.strategies import strategy_names

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def request(*subset: str) -> RequestContext:
    found = RequestContext("/v1/completions", prompt_tokens=100.0)
    found.limited_to(frozenset(subset))
    return found


class SubsetTest(unittest.TestCase):
    def fleet(self, size: int, strategy: str = "round_robin") -> Scheduler:
        registry = Registry()
        for role in PD_ROLES:
            for number in range(size):
                name = f"{role[0]}{number}"
                endpoint = registry.add(PDInstance(name, role, f"10.0.{number // 250}.{number % 250}", 80))
                registry.probed(endpoint, None)
        return Scheduler(SchedulerConfig(strategy=strategy), registry, seed=1)

    def picked(self, scheduler: Scheduler, role: InstanceRole, *subset: str, count: int = 1) -> list[str]:
        return [each.id for each in scheduler.pick(role, request(*subset), count=count)]

    def test_by_address_or_by_host(self) -> None:
        scheduler = self.fleet(4)
        for subset in (("10.0.0.2:80", "10.0.0.9:80"), ("10.0.0.2", "10.0.0.1:81")):
            for _ in range(5):
                self.assertEqual(self.picked(scheduler, D, *subset), ["d2"])
        two = {self.picked(scheduler, D, "10.0.0.0:80", "10.0.0.3")[0] for _ in range(8)}
        self.assertEqual(two, {"d0", "d3"})

    def test_an_ipv6_address(self) -> None:
        registry = Registry()
        for number in range(2):
            endpoint = registry.add(PDInstance(f"d{number}", D, f"fd00::{number}", 80))
            registry.probed(endpoint, None)
        scheduler = Scheduler(SchedulerConfig(strategy="round_robin"), registry)
        for subset in ("[fd00::1]:80", "fd00::1"):
            self.assertEqual(self.picked(scheduler, D, subset), ["d1"])

    def test_no_more_than_there_are(self) -> None:
        self.assertEqual(self.picked(self.fleet(4), D, "10.0.0.1:80", count=3), ["d1"])

    def test_prefill_is_not_limited(self) -> None:
        scheduler = self.fleet(3)
        self.assertEqual({self.picked(scheduler, P, "10.0.0.1:80")[0] for _ in range(6)}, {"p0", "p1", "p2"})

    def test_nobody(self) -> None:
        scheduler = self.fleet(3)
        for subset in ((), ("10.0.0.9:80",), ("10.0.0.1:81",)):
            self.assertEqual(self.picked(scheduler, D, *subset), [])
            self.assertFalse(scheduler.can_serve(D, None, frozenset(subset)))
        self.assertTrue(scheduler.can_serve(D, None, frozenset({"10.0.0.1"})))

    def test_of_a_large_fleet_by_each_strategy(self) -> None:
        for strategy in strategy_names():
            with self.subTest(strategy):
                scheduler = self.fleet(300, strategy)
                self.assertEqual(self.picked(scheduler, D, "10.0.1.7:80"), ["d257"])


if __name__ == "__main__":
    unittest.main()
