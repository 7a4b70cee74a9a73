import collections
import unittest

from tests.support.strategies import REQUEST, build, ids
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.strategies.power_of_two import PowerOfTwo


class PowerOfTwoTest(unittest.TestCase):
    def setUp(self) -> None:
        self.strategy = PowerOfTwo(SchedulerConfig())
        self.strategy.random.seed(1)

    def test_of_two_the_better(self) -> None:
        _, endpoints = build({"running": 5}, {"running": 3})
        for count in (1, 2):
            ranked = [ids(self.strategy.rank(endpoints, REQUEST, count)) for _ in range(20)]
            self.assertEqual(ranked, [["d1", "d0"][:count]] * 20)

    def test_the_worst_is_never_chosen_and_others_by_chance(self) -> None:
        _, endpoints = build({"running": 9}, {"running": 1}, {"running": 2})
        chosen = collections.Counter(self.strategy.rank(endpoints, REQUEST, 1)[0].id for _ in range(300))
        self.assertEqual(set(chosen), {"d1", "d2"})
        self.assertAlmostEqual(chosen["d1"], 200, delta=40)  # it is in two of three pairs

    def test_it_is_all_there_is(self) -> None:
        _, endpoints = build(None)
        self.assertEqual(ids(self.strategy.rank(endpoints, REQUEST, 4)), ["d0"])

    def test_further_ones_are_others(self) -> None:
        _, endpoints = build(*[None] * 6)
        for _ in range(20):
            self.assertEqual(len(set(self.strategy.rank(endpoints, REQUEST, 4))), 4)

    def test_requests_spread_far_better_than_by_chance(self) -> None:
        registry, endpoints = build(*[None] * 20)
        for _ in range(400):
            registry.work.reserve(self.strategy.rank(endpoints, REQUEST, 1)[0])
        self.assertLessEqual(max(e.in_flight for e in endpoints), 24)


if __name__ == "__main__":
    unittest.main()
