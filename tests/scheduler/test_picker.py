import unittest
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from tests.support.fleet import prompt, scheduler_of
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
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


class Deepest(Strategy):
    """The one that has most of the prompt, of either role."""

    reads_prefixes = True

    def score(self, endpoint: Endpoint, request: RequestContext) -> int:
        return -request.cached.get(endpoint.holder, 0)


class SchedulerTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        for number in range(3):
            for role in PD_ROLES:
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
        self.scheduler.strategies.use(f"{__name__}:Recording")
        d0, _, d2 = self.registry.endpoints(D)
        self.pick(count=2, exclude=[d0])
        recording = self.scheduler.strategies.of(D).strategy
        assert isinstance(recording, Recording)
        self.assertEqual(recording.asked, [([self.registry.get("d1"), d2], REQUEST, 2)])
        self.assertIs(recording.config, self.scheduler.config)
        self.registry.remove("d1")
        self.pick(exclude=[d0, d2])
        self.assertEqual(len(recording.asked), 1, "never asked to choose from nothing")

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

    def test_what_a_decode_instance_got_since_its_scrape_waits_only_if_others_do(self) -> None:
        scheduler = Scheduler(SchedulerConfig(max_waiting=1), self.registry)
        for role, alone in ((P, True), (D, False)):
            for endpoint in self.registry.endpoints(role):
                self.assertFalse(scheduler.limits.saturated(endpoint, 0.0))
                self.registry.work.reserve(endpoint)
                self.assertIs(scheduler.limits.saturated(endpoint, 0.0), alone)
                self.registry.scraped(endpoint, MetricsSnapshot(0.0, running=1.0), 1)
                self.assertFalse(scheduler.limits.saturated(endpoint, 0.0))
                self.registry.scraped(endpoint, MetricsSnapshot(0.0, waiting=1.0), 1)
                self.assertTrue(scheduler.limits.saturated(endpoint, 0.0))

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

    def test_prompts_are_hashed_if_somebody_wants_it(self) -> None:
        for settings, expected in (
            ({}, False),
            ({"prefill_strategy": "prefix_cache"}, True),
            ({"decode_strategy": "predicted_latency"}, True),
            ({"disaggregation": "auto"}, True),
            ({"disaggregation": 100}, False),
        ):
            with self.subTest(settings):
                scheduler = Scheduler(SchedulerConfig(**settings), self.registry)
                self.assertIs(scheduler.reads_prefixes, expected)

    def test_what_is_cached_is_looked_up_for_each_pick(self) -> None:
        request = RequestContext("/", blocks=(1, 2, 3))
        self.scheduler.pick(D, request)
        self.assertEqual(request.cached, {})
        d1 = self.registry.get("d1")
        d1.holder.store((1, 2))
        self.scheduler.pick(D, request)
        self.assertEqual(request.cached, {d1.holder: 2})

    def test_a_strategy_of_ones_own_finds_it_for_both_roles(self) -> None:
        self.scheduler.strategies.use(f"{__name__}:Deepest")
        request = RequestContext("/", blocks=(1, 2, 3))
        for role, name in ((P, "p1"), (D, "d2")):
            self.registry.get(name).holder.store((1, 2))
            self.assertEqual([e.id for e in self.scheduler.pick(role, request)], [name])

    def test_what_nobody_reads_is_not_looked_up(self) -> None:
        for name, role, reserved, expected in (
            ("least_load", P, False, 0),
            ("least_load", P, True, 1),  # for what it brings
            ("predicted_latency", P, True, 1),
            ("predicted_latency", D, True, 0),
            ("slo", D, True, 0),
            ("prefix_cache", D, True, 1),
        ):
            with self.subTest((name, role, reserved)):
                self.scheduler.strategies.use(name)
                request = prompt(blocks=(1, 2, 3))
                index = self.registry.prefixes
                with patch.object(index, "match", wraps=index.match) as match:
                    (picked,) = self.scheduler.pick(role, request)
                    if reserved:
                        self.registry.work.reserve(picked, request)
                    self.assertEqual(match.call_count, expected)

    def test_a_preview_takes_no_turn(self) -> None:
        names = ("round_robin", "least_load", "predicted_latency", "session", "prefix_cache", "slo")
        for name in names:
            with self.subTest(name):
                self.scheduler.strategies.use(name)
                for _ in range(4):
                    seen = [self.scheduler.preview(D, REQUEST, count=2)[0].id for _ in range(3)]
                    self.assertEqual(seen + self.pick(), [seen[0]] * 4)

    def test_the_same_seed_draws_the_same(self) -> None:
        config = SchedulerConfig(strategy="power_of_two")
        drawn = []
        for seed in (1, 1, 2):
            self.scheduler = Scheduler(config, self.registry, seed)
            drawn.append([self.pick() for _ in range(20)])
        self.assertEqual(drawn[0], drawn[1])
        self.assertNotEqual(drawn[0], drawn[2])


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


if __name__ == "__main__":
    unittest.main()
