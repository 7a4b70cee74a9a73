import unittest
from typing import Any

from tests.support.strategies import REQUEST, build, ids, strategy


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
