"""The strategies of the configuration's table: what each prefers, and what all of them keep to."""

import collections
import math
import unittest
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies.fleet import REQUEST, build, fleets, ids, scrapes
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies import Strategy, load_strategy

NAMES = ["round_robin", "least_load", "weighted"]


def strategy(name: str, **weights: float) -> Strategy:
    return load_strategy(name)(SchedulerConfig(strategy=name, **weights))


class Fixed(Strategy):
    """Has the scores that it was given."""

    all: list[float]

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> list[float]:
        return self.all


def picks(chosen: Strategy, registry: Registry, endpoints: list[Endpoint], count: int) -> list[str]:
    """Pick and reserve ``count`` times, as requests do that come at once."""
    found = []
    for _ in range(count):
        best = chosen.rank(endpoints, REQUEST, 1)[0]
        registry.reserve(best)
        found.append(best.id)
    return found


class RoundRobinTest(unittest.TestCase):
    def test_each_in_turn_whatever_the_load(self) -> None:
        registry, endpoints = build({"waiting": 50}, None, {"kv_usage": 1.0})
        self.assertEqual(
            picks(strategy("round_robin"), registry, endpoints, 7), ["d0", "d1", "d2", "d0", "d1", "d2", "d0"]
        )

    def test_the_rest_follow_in_order(self) -> None:
        _, endpoints = build(None, None, None)
        chosen = strategy("round_robin")
        self.assertEqual(ids(chosen.rank(endpoints, REQUEST, 3)), ["d0", "d1", "d2"])
        self.assertEqual(ids(chosen.rank(endpoints, REQUEST, 2)), ["d1", "d2"])
        self.assertEqual(ids(chosen.rank(endpoints, REQUEST, 9)), ["d2", "d0", "d1"])

    def test_a_fleet_that_shrinks(self) -> None:
        _, endpoints = build(None, None, None)
        chosen = strategy("round_robin")
        for size in (3, 3, 3, 1, 2, 1):
            self.assertEqual(len(chosen.rank(endpoints[:size], REQUEST, size)), size)


class LeastLoadTest(unittest.TestCase):
    def rank(self, *loads: dict[str, Any] | None) -> list[str]:
        _, endpoints = build(*loads)
        return ids(strategy("least_load").rank(endpoints, REQUEST, len(endpoints)))

    def test_fewest_waiting_first(self) -> None:
        self.assertEqual(self.rank({"waiting": 3}, {"waiting": 1}, {"waiting": 2}), ["d1", "d2", "d0"])

    def test_waiting_counts_before_running(self) -> None:
        self.assertEqual(self.rank({"waiting": 1}, {"running": 90}), ["d1", "d0"])

    def test_fewest_running_among_equally_many_waiting(self) -> None:
        self.assertEqual(self.rank({"running": 3}, {"running": 1}, {"running": 2}), ["d1", "d2", "d0"])

    def test_cache_and_latency_do_not_matter(self) -> None:
        self.assertEqual(self.rank({"kv_usage": 1.0, "latency": 9.0}, {"running": 1}), ["d0", "d1"])

    def test_what_was_sent_since_the_scrape_counts(self) -> None:
        registry, endpoints = build({"waiting": 0}, {"waiting": 2})
        self.assertEqual(
            collections.Counter(picks(strategy("least_load"), registry, endpoints, 10)), {"d0": 6, "d1": 4}
        )

    def test_an_idle_fleet_is_used_evenly(self) -> None:
        _, endpoints = build(None, None, None)
        chosen = strategy("least_load")
        first = [chosen.rank(endpoints, REQUEST, 1)[0].id for _ in range(30)]
        self.assertEqual(collections.Counter(first), {"d0": 10, "d1": 10, "d2": 10})


class WeightedTest(unittest.TestCase):
    def rank(self, *loads: dict[str, Any] | None, **weights: float) -> list[str]:
        _, endpoints = build(*loads)
        return ids(strategy("weighted", **weights).rank(endpoints, REQUEST, len(endpoints)))

    def only(self, name: str) -> dict[str, float]:
        return {"load_weight": 0.0, "kv_cache_weight": 0.0, "latency_weight": 0.0, name: 1.0}

    def test_each_term_alone(self) -> None:
        loads: list[dict[str, Any]] = [
            {"running": 1, "kv_usage": 0.9, "latency": 0.5},
            {"running": 2, "kv_usage": 0.1, "latency": 0.9},
            {"running": 3, "kv_usage": 0.5, "latency": 0.1},
        ]
        self.assertEqual(self.rank(*loads, **self.only("load_weight")), ["d0", "d1", "d2"])
        self.assertEqual(self.rank(*loads, **self.only("kv_cache_weight")), ["d1", "d2", "d0"])
        self.assertEqual(self.rank(*loads, **self.only("latency_weight")), ["d2", "d0", "d1"])

    def test_the_score_is_the_documented_sum(self) -> None:
        _, endpoints = build(
            {"running": 8, "waiting": 2, "kv_usage": 0.5, "latency": 0.2},
            {"running": 5, "kv_usage": 0.8, "latency": 0.1},
        )
        chosen = strategy("weighted")
        scores = chosen.scores(endpoints, REQUEST)
        self.assertAlmostEqual(scores[0], 0.5 * 10 / 10 + 0.3 * 0.5 + 0.2 * 0.2 / 0.2)
        self.assertAlmostEqual(scores[1], 0.5 * 5 / 10 + 0.3 * 0.8 + 0.2 * 0.1 / 0.2)

    def test_no_latency_yet_counts_as_the_mean(self) -> None:
        ranked = self.rank(
            {"latency": 0.1}, {"latency": 0.3}, {"latency": None}, **self.only("latency_weight")
        )
        self.assertEqual(ranked, ["d0", "d2", "d1"])

    def test_nothing_known_at_all(self) -> None:
        self.assertEqual(sorted(self.rank(None, None, {"latency": 0.0})), ["d0", "d1", "d2"])

    def test_a_pick_does_not_remember_the_one_before(self) -> None:
        _, endpoints = build({"latency": 100.0, "running": 99}, {"latency": 0.2}, {"latency": 0.1})
        chosen = strategy("weighted", **self.only("latency_weight"))
        chosen.rank(endpoints, REQUEST, 1)
        chosen.rank(endpoints[1:], REQUEST, 1)
        self.assertAlmostEqual(chosen.scores(endpoints[1:], REQUEST)[0], 1.0)


class InvariantsTest(unittest.TestCase):
    @given(
        name=st.sampled_from(NAMES),
        fleet=fleets,
        calls=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=6),
    )
    @settings(derandomize=True, deadline=None, max_examples=150)
    def test_a_ranking_is_the_best_of_the_candidates(
        self, name: str, fleet: list[tuple[dict[str, Any] | None, int]], calls: list[tuple[int, int]]
    ) -> None:
        registry, endpoints = build(*(scrape for scrape, _ in fleet))
        for endpoint, (_, sent) in zip(endpoints, fleet, strict=True):
            for _ in range(sent):
                registry.reserve(endpoint)
        chosen = strategy(name)
        for count, size in calls:
            candidates = endpoints[:size]
            ranked = chosen.rank(candidates, REQUEST, count)
            self.assertEqual(len(ranked), min(count, len(candidates)))
            self.assertEqual(len(set(ranked)), len(ranked))
            self.assertLessEqual(set(ranked), set(candidates))
            if name != "round_robin":
                scores = dict(zip(candidates, chosen.scores(candidates, REQUEST), strict=True))
                self.assertEqual([scores[e] for e in ranked], sorted(scores.values())[:count])

    @given(scores=st.lists(st.sampled_from([0.0, 1.0, 2.5, math.inf]), min_size=1, max_size=8))
    @settings(derandomize=True, deadline=None, max_examples=150)
    def test_equal_scores_take_turns_and_none_comes_twice(self, scores: list[float]) -> None:
        """Also of a strategy that says "never" by an infinite score."""
        _, endpoints = build(*[None] * len(scores))
        chosen = Fixed(SchedulerConfig())
        chosen.all = scores
        for turn in range(1, 12):
            order = [(turn + n) % len(scores) for n in range(len(scores))]
            order.sort(key=scores.__getitem__)
            for count in (1, 3):
                with chosen.same_turn():
                    ranked = chosen.rank(endpoints, REQUEST, count)
                self.assertEqual(ranked, [endpoints[n] for n in order[:count]])
            chosen.rank(endpoints, REQUEST, 1)

    @given(
        name=st.sampled_from(NAMES),
        load=scrapes,
        size=st.integers(1, 6),
        burst=st.integers(1, 40),
    )
    @settings(derandomize=True, deadline=None, max_examples=150)
    def test_a_burst_between_two_scrapes_spreads_evenly(
        self, name: str, load: dict[str, Any] | None, size: int, burst: int
    ) -> None:
        """Instances that look the same get the same number, to within one."""
        registry, endpoints = build(*[load] * size)
        sent = collections.Counter({endpoint.id: 0 for endpoint in endpoints})
        sent.update(picks(strategy(name), registry, endpoints, burst))
        self.assertEqual(len(sent), size)
        self.assertLessEqual(max(sent.values()) - min(sent.values()), 1)


if __name__ == "__main__":
    unittest.main()
