"""LoRA affinity: an adapter's requests go where it is loaded, and do not pile up there."""

import random
import unittest
from typing import Any

from tests.support.fleet import D, P, prompt, registry_of, scheduler_of
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, MetricsSnapshot
from vllm_pd_scheduler.scheduler.affinity import SHARE, SLACK
from vllm_pd_scheduler.strategies import strategy_names

BASE, MINE, OTHER = "base", "mine", "other"


class AffinityTest(unittest.TestCase):
    def setUp(self) -> None:
        self.start()

    def start(self, prefill: int = 4, decode: int = 4, **config: Any) -> None:
        self.scheduler = scheduler_of(prefill, decode, **config)
        self.registry = self.scheduler.registry
        adapters = frozenset({MINE, OTHER})
        for endpoint in self.registry:
            self.registry.models.listed(endpoint, frozenset({BASE}) | adapters, adapters)

    def load(self, *names: str, adapter: str = MINE) -> None:
        for name in names:
            snapshot = MetricsSnapshot(0.0, adapters=(adapter,), adapter_slots=4)
            self.registry.scraped(self.registry.get(name), snapshot, 0)

    def chosen(self, role: InstanceRole, model: str = MINE) -> set[str]:
        found = set()
        for now in range(20):
            request = prompt(model=model, now=float(now), session=str(now))
            found.add(self.scheduler.pick(role, request)[0].id)
        return found

    def busy(self, name: str, count: int) -> None:
        for _ in range(count):
            self.registry.work.reserve(self.registry.get(name), prompt(3000.0, model=BASE))

    def test_whichever_strategy(self) -> None:
        for name, role in ((name, role) for name in strategy_names() for role in PD_ROLES):
            with self.subTest(name, role=role):
                self.start(strategy=name)
                initial = role[0]
                self.load(f"{initial}1", f"{initial}3")
                self.assertLessEqual(self.chosen(role), {f"{initial}1", f"{initial}3"})
                self.assertGreater(len(self.chosen(role, OTHER)), 0)
                if name == "round_robin":
                    self.assertEqual(len(self.chosen(role, BASE)), 4, "the base model's go everywhere")
                    self.assertEqual(len(self.chosen(role, OTHER)), 4, "nobody has it loaded")

    def test_not_one_that_is_clearly_busier(self) -> None:
        for role, name in ((P, "p2"), (D, "d2")):
            for busy, expected in ((0, True), (1, role is D), (2, role is D), (3, False), (9, False)):
                with self.subTest(role=role, busy=busy):
                    self.start(strategy="round_robin")
                    self.load(name)
                    self.busy(name, busy)
                    self.assertEqual(self.chosen(role) == {name}, expected)

    def test_one_that_is_full_or_on_trial_or_down(self) -> None:
        self.start(max_in_flight_tokens=2000)
        self.load("d1")
        self.assertEqual(self.chosen(D), {"d1"})
        self.registry.ends.overloaded(self.registry.get("d1"), 100.0)
        request = prompt(model=MINE, now=100.0)
        self.assertNotEqual(self.scheduler.pick(D, request)[0].id, "d1")
        self.registry.drain("d1")
        self.assertNotIn("d1", self.chosen(D))

    def test_it_is_loaded_where_a_request_was_sent(self) -> None:
        """The next scrape may be seconds away, and a prefill over by then."""
        for role in (P, D):
            first = self.scheduler.pick(role, prompt(model=MINE))[0]
            self.registry.work.reserve(first, prompt(1.0, model=MINE)).release(0.0)
            self.assertEqual(self.chosen(role), {first.id})

    def test_further_endpoints_are_any(self) -> None:
        self.load("d3")
        picked = self.scheduler.pick(D, prompt(model=MINE), count=4)
        self.assertEqual(picked[0].id, "d3")
        others = self.scheduler.last_resorts(D, picked, MINE)
        self.assertEqual({e.id for e in (*picked, *others)}, {"d0", "d1", "d2", "d3"})
        (again,) = self.scheduler.pick(D, prompt(model=MINE), exclude=picked[:1])
        self.assertNotEqual(again.id, "d3")

    def test_a_large_fleet(self) -> None:
        """Those that have it need not be in the sample that is drawn."""
        self.start(400, 400)
        self.load("d399", "p7")
        self.assertEqual(self.chosen(D), {"d399"})
        self.assertEqual(self.chosen(P), {"p7"})

    def test_one_adapter_does_not_pile_up(self) -> None:
        """Whatever its share of the load, no D has more than the rule allows, nor does any stand idle."""
        draw = random.Random(1)
        for strategy in ("least_load", "power_of_two", "predicted_latency"):
            for rate in (0.2, 2.0, 8.0):
                with self.subTest(strategy, rate=rate):
                    self.start(strategy=strategy, decode=8)
                    running: list[tuple[float, Reservation]] = []
                    worst, used = 0.0, set()
                    for step in range(600):
                        for _ in range(int(rate) + (draw.random() < rate % 1)):
                            request = prompt(100.0, model=MINE, now=float(step))
                            picked = self.scheduler.pick(D, request)[0]
                            used.add(picked.id)
                            running.append(
                                (step + draw.expovariate(0.1), self.registry.work.reserve(picked, request))
                            )
                            loads = [e.requests for e in self.registry.endpoints(D)]
                            worst = max(worst, picked.requests - SHARE * min(loads))
                        for _, reservation in [each for each in running if each[0] <= step]:
                            reservation.release(float(step))
                        running = [each for each in running if each[0] > step]
                    # One more than the rule's, for the request itself; random picks compare two only.
                    self.assertLessEqual(worst, SLACK[D] + (6 if strategy == "power_of_two" else 1))
                    if rate >= 8:
                        self.assertEqual(len(used), 8, "under load it is loaded everywhere")
                    if rate < 1:
                        self.assertLess(len(used), 8, "a few instances are enough for a few requests")


class LoadedTest(unittest.TestCase):
    """What is taken for loaded: as many as there are slots, those used last."""

    def setUp(self) -> None:
        self.registry = registry_of(1, 1)
        self.endpoint = self.registry.get("d0")
        self.registry.models.listed(self.endpoint, frozenset("abcd") | {BASE}, frozenset("abcd"))

    def use(self, *names: str) -> tuple[str, ...]:
        for name in names:
            self.registry.work.reserve(self.endpoint, prompt(model=name))
        return self.endpoint.models.loaded

    def test_one_slot_unless_it_says_more(self) -> None:
        self.assertEqual(self.use("a", "b"), ("b",))
        self.registry.scraped(self.endpoint, MetricsSnapshot(0.0, adapters=("c",), adapter_slots=2), 0)
        self.assertEqual(self.endpoint.models.loaded, ("b", "c"))
        self.assertEqual(self.use("a"), ("c", "a"))
        self.assertEqual(self.use("c", "c"), ("a", "c"))

    def test_what_is_no_adapter(self) -> None:
        self.assertEqual(self.use(BASE, "x"), ())
        self.registry.scraped(self.endpoint, MetricsSnapshot(0.0, adapters=("x", BASE), adapter_slots=2), 0)
        self.assertEqual(self.endpoint.models.loaded, ())

    def test_the_version_changes_with_the_set_alone(self) -> None:
        self.registry.scraped(self.endpoint, MetricsSnapshot(0.0, adapter_slots=2), 0)
        before = self.registry.models.adapters_version
        self.use("a", "b")
        self.assertEqual(self.registry.models.adapters_version, before + 2)
        self.use("a", "b", "b", "a")
        self.assertEqual(self.registry.models.adapters_version, before + 2)

    def test_unloaded_and_restarted(self) -> None:
        self.registry.scraped(self.endpoint, MetricsSnapshot(0.0, adapters=("a", "b"), adapter_slots=4), 0)
        self.registry.models.listed(self.endpoint, frozenset({BASE, "a"}), frozenset("a"))
        self.assertEqual(self.endpoint.models.loaded, ("a",))
        self.registry.started(self.endpoint, 1.0)
        self.registry.started(self.endpoint, 2.0)
        self.assertEqual(self.endpoint.models.loaded, ())


if __name__ == "__main__":
    unittest.main()
