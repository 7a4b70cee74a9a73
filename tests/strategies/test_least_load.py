import collections
import unittest
from typing import Any

from tests.support.strategies import REQUEST, build, ids, picks, strategy


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
