import collections
import math
import unittest
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.strategies import REQUEST, build, ids
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies import session
from vllm_pd_scheduler.strategies.session import Session

NAMES = [f"session-{number}" for number in range(400)]


def of(name: str) -> RequestContext:
    return RequestContext("/", session=name)


def homes(strategy: Session, endpoints: list[Endpoint]) -> dict[str, str]:
    return {name: strategy.rank(endpoints, of(name), 1)[0].id for name in NAMES}


class SessionTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry, self.endpoints = build(*[None] * 8)
        self.strategy = Session(SchedulerConfig())

    def test_a_session_stays_where_it_is(self) -> None:
        before = homes(self.strategy, self.endpoints)
        self.assertEqual(homes(self.strategy, self.endpoints), before)
        other = Session(SchedulerConfig())  # another scheduler, or this one after a restart
        self.assertEqual(homes(other, self.endpoints[::-1]), before)

    def test_shares_are_about_even(self) -> None:
        counted = collections.Counter(homes(self.strategy, self.endpoints).values())
        self.assertEqual(len(counted), 8)
        self.assertLess(max(counted.values()), 2 * len(NAMES) / 8)

    def test_only_those_of_an_endpoint_that_leaves_move(self) -> None:
        before = homes(self.strategy, self.endpoints)
        after = homes(self.strategy, self.endpoints[1:])
        moved = {name for name in NAMES if before[name] != after[name]}
        self.assertEqual(moved, {name for name in NAMES if before[name] == "d0"})
        self.assertGreater(len({after[name] for name in moved}), 3, "they are spread over the others")
        self.assertEqual(homes(self.strategy, self.endpoints), before, "and they return")

    def test_one_that_returns_under_its_name_is_the_same(self) -> None:
        before = homes(self.strategy, self.endpoints)
        _, again = build(*[None] * 8)
        self.assertEqual(homes(self.strategy, again), before)
        self.assertIn(self.strategy.rank(again, of("x"), 1)[0], again)

    def test_the_next_ones_are_those_to_which_it_would_move(self) -> None:
        for name in NAMES[:50]:
            first, second = self.strategy.rank(self.endpoints, of(name), 2)
            rest = [e for e in self.endpoints if e is not first]
            self.assertIs(self.strategy.rank(rest, of(name), 1)[0], second)

    def test_without_a_session_the_fewest_requests(self) -> None:
        for endpoint in self.endpoints[:3] + self.endpoints[4:]:
            self.registry.work.reserve(endpoint)
        self.assertEqual(ids(self.strategy.rank(self.endpoints, REQUEST, 1)), ["d3"])

    def test_points_are_hashed_once(self) -> None:
        """Every pick can have other candidates: those that are not saturated, or were not tried."""
        homes(self.strategy, self.endpoints)
        with mock.patch.object(session, "_points", side_effect=AssertionError("hashed again")):
            for number in range(8):
                rest = self.endpoints[:number] + self.endpoints[number + 1 :]
                self.strategy.rank(rest, of("a"), 2)

    def test_the_ring_forgets_who_is_gone(self) -> None:
        _, many = build(*[None] * 100)
        for number in range(0, 100, 4):
            self.strategy.rank(many[number : number + 4], of("a"), 1)
        self.assertLessEqual(len(self.strategy._on_ring), 16)

    @given(
        size=st.integers(1, 6),
        requests=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=80),
    )
    @settings(derandomize=True, deadline=None, max_examples=100)
    def test_nobody_gets_more_than_its_bound(self, size: int, requests: list[tuple[int, bool]]) -> None:
        registry, endpoints = build(*[None] * size)
        strategy, held = Session(SchedulerConfig()), []
        assert strategy.bound is not None
        for name, leaves in requests:
            if leaves and held:
                held.pop(0).release()
            best = strategy.rank(endpoints, of(str(name)), 1)[0]
            held.append(registry.work.reserve(best))
            self.assertLessEqual(best.in_flight, math.ceil(strategy.bound * len(held) / size))


if __name__ == "__main__":
    unittest.main()
