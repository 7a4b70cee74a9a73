"""The newest requests, within bounds."""

import unittest

from vllm_pd_scheduler.records.traffic import MAX_AGE_S, MAX_BLOCKS, MAX_REQUESTS, Recorded, Traffic


def request(arrived: float, blocks: int = 0) -> Recorded:
    return Recorded(arrived, 100.0, True, tuple(range(blocks)))


class TrafficTest(unittest.TestCase):
    def test_it_is_bounded_in_requests(self) -> None:
        traffic = Traffic()
        for number in range(MAX_REQUESTS + 10):
            traffic.add(request(number / 1000))
        self.assertEqual(len(traffic), MAX_REQUESTS)
        self.assertAlmostEqual(next(iter(traffic)).arrived, 0.01)

    def test_it_is_bounded_in_hashes(self) -> None:
        traffic = Traffic()
        for number in range(10):
            traffic.add(request(number, MAX_BLOCKS // 4))
        self.assertEqual([each.arrived for each in traffic], [6.0, 7.0, 8.0, 9.0])
        traffic.add(request(10.0, MAX_BLOCKS + 1))
        self.assertEqual(len(traffic), 0, "one alone that is too much")
        traffic.add(request(11.0, MAX_BLOCKS))
        self.assertEqual(len(traffic), 1)

    def test_it_is_bounded_in_time(self) -> None:
        traffic = Traffic()
        for arrived in (0.0, 1.0, MAX_AGE_S, MAX_AGE_S + 0.5):
            traffic.add(request(arrived))
        self.assertEqual([each.arrived for each in traffic], [1.0, MAX_AGE_S, MAX_AGE_S + 0.5])

    def test_since_a_time_in_the_order_of_arrival(self) -> None:
        """A request that has waited is sent after others that came later."""
        traffic = Traffic()
        for arrived in (1.0, 5.0, 7.0, 4.0, 8.0):
            traffic.add(request(arrived))
        self.assertEqual([each.arrived for each in traffic.since(4.0)], [4.0, 5.0, 7.0, 8.0])
        self.assertEqual(traffic.since(9.0), [])
