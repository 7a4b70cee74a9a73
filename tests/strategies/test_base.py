"""What all the simple strategies keep to."""

import collections
import math
import unittest
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.strategies import REQUEST, build, fleets, picks, scrapes, strategy
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies import Strategy

NAMES = ["round_robin", "least_load", "weighted"]


class Fixed(Strategy):
    """Has the scores that it was given."""

    all: list[float]

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> list[float]:
        return self.all


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
                registry.work.reserve(endpoint)
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
