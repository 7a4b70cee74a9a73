import unittest

from tests.support.strategies import REQUEST, build, ids, picks, strategy


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
