import unittest
from collections.abc import Sequence
from typing import Any

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole, PDInstance, RequestContext
from vllm_pd_scheduler.registry import Endpoint, Registry
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.strategies import Strategy, UnknownStrategy

REQUEST = RequestContext("/v1/completions")
P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class Recording(Strategy):
    """Keeps what it was asked."""

    asked: list[tuple[Any, ...]]

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.asked = []

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        self.asked.append((list(endpoints), request, count))
        return list(endpoints)[:count]


class SchedulerTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        for number in range(3):
            for role in InstanceRole:
                name = f"{role[0]}{number}"
                endpoint = self.registry.add(PDInstance(name, role, f"10.0.0.{number}", 80))
                self.registry.probed(endpoint, None)
        self.scheduler = Scheduler(SchedulerConfig(strategy="round_robin"), self.registry)

    def pick(self, role: InstanceRole = D, **more: Any) -> list[str]:
        return [endpoint.id for endpoint in self.scheduler.pick(role, REQUEST, **more)]

    def test_roles_have_turns_of_their_own(self) -> None:
        self.assertEqual(
            [self.pick(P), self.pick(D), self.pick(P), self.pick(D)], [["p0"], ["d0"], ["p1"], ["d1"]]
        )

    def test_only_the_routable_are_offered(self) -> None:
        self.registry.drain("d0")
        self.registry.probed(self.registry.get("d2"), "down")
        self.registry.probed(self.registry.get("d2"), "down")
        self.assertEqual([self.pick(count=3) for _ in range(3)], [["d1"]] * 3)
        self.registry.remove("d1")
        self.assertEqual(self.pick(), [])
        self.assertEqual(self.pick(P), ["p0"])

    def test_excluded_ones_are_not_offered(self) -> None:
        d0, d1, d2 = self.registry.endpoints(D)
        self.assertEqual(self.pick(exclude=[d0, d1], count=2), ["d2"])
        self.assertEqual(self.pick(exclude=[d0, d1, d2]), [])

    def test_what_a_strategy_is_told(self) -> None:
        self.scheduler.use(f"{__name__}:Recording")
        d0, _, d2 = self.registry.endpoints(D)
        self.pick(count=2, exclude=[d0])
        recording = self.scheduler._strategies[D]
        assert isinstance(recording, Recording)
        self.assertEqual(recording.asked, [([self.registry.get("d1"), d2], REQUEST, 2)])
        self.assertIs(recording.config, self.scheduler.config)
        self.registry.remove("d1")
        self.pick(exclude=[d0, d2])
        self.assertEqual(len(recording.asked), 1, "never asked to choose from nothing")

    def test_a_strategy_can_be_changed_while_requests_run(self) -> None:
        self.assertEqual(self.scheduler.strategy_name, "round_robin")
        self.registry.reserve(self.registry.get("d0"))
        self.registry.reserve(self.registry.get("d1"))
        self.scheduler.use("least_load")
        self.assertEqual(self.scheduler.strategy_name, "least_load")
        self.assertEqual([self.pick() for _ in range(3)], [["d2"]] * 3)

    def test_roles_may_differ(self) -> None:
        config = SchedulerConfig(strategy="weighted", decode_strategy="session")
        scheduler = Scheduler(config, self.registry)
        self.assertEqual(scheduler.names, {P: "weighted", D: "session"})
        self.assertEqual(scheduler.strategy_name, "weighted/session")
        scheduler.use("slo", P)
        self.assertEqual(scheduler.names, {P: "slo", D: "session"})
        with self.assertRaises(UnknownStrategy):
            scheduler.use_each({P: "least_load", D: "fastest"})
        self.assertEqual(scheduler.names, {P: "slo", D: "session"}, "both or none")
        scheduler.use("slo")
        self.assertEqual(scheduler.strategy_name, "slo")

    def test_an_unknown_one_changes_nothing(self) -> None:
        self.pick()
        for name in ("fastest", "no.such:Module", "os:path"):
            with self.assertRaises(UnknownStrategy):
                self.scheduler.use(name)
        self.assertEqual(self.scheduler.strategy_name, "round_robin")
        self.assertEqual(self.pick(), ["d1"])


if __name__ == "__main__":
    unittest.main()
