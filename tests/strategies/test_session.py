"""Sessions on a ring: they stay where they are while others come, go and are full."""

import random
import unittest
from unittest import mock

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import RequestContext
from vllm_pd_scheduler.registry import Endpoint
from vllm_pd_scheduler.strategies import session
from vllm_pd_scheduler.strategies.session import Session

from .fleet import build, ids

SESSIONS = [f"conversation-{number}" for number in range(60)]


class SessionTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry, self.endpoints = build(*[None] * 5)
        self.strategy = Session(SchedulerConfig())

    def homes(self, endpoints: list[Endpoint], strategy: Session | None = None) -> dict[str, str]:
        chosen = strategy or self.strategy
        return {
            name: ids(chosen.rank(endpoints, RequestContext("/", session=name), 1))[0] for name in SESSIONS
        }

    def test_each_has_its_place_and_all_have_some(self) -> None:
        homes = self.homes(self.endpoints)
        self.assertEqual(set(homes.values()), {"d0", "d1", "d2", "d3", "d4"})
        self.assertEqual(self.homes(self.endpoints[::-1]), homes)

    def test_only_the_sessions_of_one_that_left_move(self) -> None:
        before, after = self.homes(self.endpoints), self.homes(self.endpoints[1:])
        for name in SESSIONS:
            if before[name] != "d0":
                self.assertEqual(after[name], before[name])
        self.assertEqual(self.homes(self.endpoints), before, "and they return")

    def test_it_remembers_nothing_that_matters(self) -> None:
        """Whoever was offered before, a choice is that of a strategy made anew."""
        chance = random.Random(1)
        for _ in range(40):
            offered = chance.sample(self.endpoints, chance.randint(1, 5))
            self.assertEqual(self.homes(offered), self.homes(offered, Session(SchedulerConfig())))

    def test_the_ring_is_not_made_anew_for_each_request(self) -> None:
        """With limits, who is offered changes all the time."""
        self.homes(self.endpoints)
        with mock.patch.object(session, "_points", side_effect=AssertionError("made anew")):
            for left_out in range(5):
                self.homes([e for i, e in enumerate(self.endpoints) if i != left_out])
                self.homes(list(self.endpoints))

    def test_those_that_left_are_forgotten_when_others_come(self) -> None:
        self.homes(self.endpoints)
        for name in ("d0", "d1", "d2"):
            self.registry.remove(name)
        _, others = build(None)
        self.homes([*self.endpoints[3:], *others])
        self.assertEqual(len(self.strategy._members), 3)

    def test_one_at_its_bound_is_passed_over_and_comes_last(self) -> None:
        request = RequestContext("/", session="conversation-0")
        home, second = self.strategy.rank(self.endpoints, request, 2)
        for _ in range(3):
            self.registry.reserve(home)
        self.assertEqual(self.strategy.rank(self.endpoints, request, 1), [second])
        self.assertEqual(self.strategy.rank(self.endpoints, request, 5)[-1], home)

    def test_without_a_session_fewest_requests(self) -> None:
        for endpoint in self.endpoints[:4]:
            self.registry.reserve(endpoint)
        self.assertEqual(ids(self.strategy.rank(self.endpoints, RequestContext("/"), 1)), ["d4"])


if __name__ == "__main__":
    unittest.main()
