import unittest
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from tests.support.fleet import prompt
from tests.support.scheduling import REQUEST, D, P, SchedulerCase
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.strategies import Strategy


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


class SchedulerTest(SchedulerCase):
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


if __name__ == "__main__":
    unittest.main()
