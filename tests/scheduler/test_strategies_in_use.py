"""Which strategies are in use."""

from tests.support.scheduling import D, P, SchedulerCase
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.strategies import UnknownStrategy


class StrategiesInUseTest(SchedulerCase):
    def test_a_strategy_can_be_changed_while_requests_run(self) -> None:
        self.assertEqual(self.scheduler.strategies.name, "round_robin")
        self.registry.work.reserve(self.registry.get("d0"))
        self.registry.work.reserve(self.registry.get("d1"))
        self.scheduler.strategies.use("least_load")
        self.assertEqual(self.scheduler.strategies.name, "least_load")
        self.assertEqual([self.pick() for _ in range(3)], [["d2"]] * 3)

    def test_roles_may_differ(self) -> None:
        config = SchedulerConfig(strategy="weighted", decode_strategy="session")
        scheduler = Scheduler(config, self.registry)
        self.assertEqual(scheduler.strategies.names, {P: "weighted", D: "session"})
        self.assertEqual(scheduler.strategies.name, "weighted/session")
        scheduler.strategies.use("slo", P)
        self.assertEqual(scheduler.strategies.names, {P: "slo", D: "session"})
        with self.assertRaises(UnknownStrategy):
            scheduler.strategies.use_each({P: "least_load", D: "fastest"})
        self.assertEqual(scheduler.strategies.names, {P: "slo", D: "session"}, "both or none")
        scheduler.strategies.use("slo")
        self.assertEqual(scheduler.strategies.name, "slo")

    def test_an_unknown_one_changes_nothing(self) -> None:
        self.pick()
        for name in ("fastest", "no.such:Module", "os:path"):
            with self.assertRaises(UnknownStrategy):
                self.scheduler.strategies.use(name)
        self.assertEqual(self.scheduler.strategies.name, "round_robin")
        self.assertEqual(self.pick(), ["d1"])

    def test_roles_can_have_strategies_of_their_own(self) -> None:
        config = SchedulerConfig(strategy="weighted", prefill_strategy="slo")
        scheduler = Scheduler(config, self.registry)
        self.assertEqual(scheduler.strategies.name, "slo/weighted")
        self.assertEqual(scheduler.strategies.names, {P: "slo", D: "weighted"})
        scheduler.strategies.use("session", D)
        self.assertEqual(scheduler.strategies.name, "slo/session")
        with self.assertRaises(UnknownStrategy):
            scheduler.strategies.use("fastest", P)
        self.assertEqual(scheduler.strategies.name, "slo/session")
        scheduler.strategies.use("slo")
        self.assertEqual(scheduler.strategies.name, "slo")
        self.assertIsNot(scheduler.strategies.of(P), scheduler.strategies.of(D))
