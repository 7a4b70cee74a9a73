"""Which model a request gets by a rule: weights, sessions, targets that nobody serves, several sources."""

import math
import unittest
from collections import Counter
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.request.rewrites import Rewrite, Rewrites, Target

weights = st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(any)


def rewrites(*rules: Rewrite) -> Rewrites:
    made = Rewrites()
    made.update("test", rules)
    return made


def rule(model: str | None, *given: int, created: float = 0.0) -> Rewrite:
    """A rule whose targets are called ``t0``, ``t1`` and so on."""
    return Rewrite(model, [Target(f"t{number}", weight) for number, weight in enumerate(given)], created)


def chosen(
    made: Rewrites, model: str = "a", session: str | None = None, can_serve: Callable[[str], bool] = bool
) -> str | None:
    found = made.choose(model, session, can_serve)
    return None if found is None else found[1]


class WeightsTest(unittest.TestCase):
    @given(given=weights, count=st.integers(1, 400))
    @settings(deadline=None, derandomize=True, max_examples=60)
    def test_each_target_gets_its_share(self, given: list[int], count: int) -> None:
        """Of any number in a row, within what the logarithm of that number allows."""
        made = rewrites(rule("a", *given))
        found = Counter(chosen(made) for _ in range(count))
        for number, weight in enumerate(given):
            share = count * weight / sum(given)
            self.assertLessEqual(abs(found[f"t{number}"] - share), 2 + math.log2(count))
            if not weight:
                self.assertEqual(found[f"t{number}"], 0)

    def test_one_in_twenty(self) -> None:
        made = rewrites(rule("a", 95, 5))
        found = Counter(chosen(made) for _ in range(1000))
        self.assertLessEqual(abs(found["t1"] - 50), 1)

    @given(given=weights, session=st.text(max_size=20))
    @settings(deadline=None, derandomize=True, max_examples=60)
    def test_a_session_keeps_its_target_whichever_scheduler_is_asked(
        self, given: list[int], session: str
    ) -> None:
        first, second = rewrites(rule("a", *given)), rewrites(rule("a", *given))
        for _ in range(3):
            chosen(first)
        self.assertEqual(chosen(first, session=session), chosen(second, session=session))

    def test_sessions_get_their_share(self) -> None:
        made = rewrites(rule("a", 90, 10))
        found = Counter(chosen(made, session=f"session {number}") for number in range(4000))
        self.assertLess(abs(found["t1"] - 400), 100)

    def test_a_canary_that_grows_moves_no_session_back(self) -> None:
        sessions = [f"session {number}" for number in range(300)]
        before: set[str] = set()
        for weight in (0, 5, 10, 50, 100):
            made = rewrites(rule("a", 100 - weight, weight))
            canary = {each for each in sessions if chosen(made, session=each) == "t1"}
            self.assertLessEqual(before, canary)
            before = canary
        self.assertEqual(len(before), 300)

    def test_targets_that_cannot_be_served(self) -> None:
        made = rewrites(rule("a", 1, 1, 2, 0))
        for served, expected in (
            ({"t0", "t1", "t2"}, {"t0", "t1", "t2"}),
            ({"t0", "t2"}, {"t0", "t2"}),
            ({"t1"}, {"t1"}),
            (set(), {"t0", "t1", "t2"}),
            ({"t3"}, {"t0", "t1", "t2"}),
        ):
            for session in (None, "s"):
                found = {
                    chosen(made, session=session and f"{session}{number}", can_serve=served.__contains__)
                    for number in range(40)
                }
                self.assertEqual(found, expected, (served, session))


class RulesTest(unittest.TestCase):
    def test_none(self) -> None:
        made = Rewrites()
        self.assertFalse(made.active)
        self.assertIsNone(made.choose("a", None, bool))
        self.assertEqual(made.targets("a"), ["a"])

    def test_what_counts(self) -> None:
        exact = Rewrite("a", [Target("exact")], 5.0)
        older = Rewrite("a", [Target("older")], 1.0)
        any_ = Rewrite(None, [Target("any")], 0.0)
        later = Rewrite(None, [Target("later")], 0.0)
        for rules, of_a, of_b in (
            ([exact], "exact", None),
            ([any_, exact], "exact", "any"),
            ([exact, older], "older", None),
            ([any_, later], "any", "any"),
            ([later, any_], "later", "later"),
            ([any_, exact, older, later], "older", "any"),
        ):
            made = rewrites(*rules)
            self.assertEqual((chosen(made, "a"), chosen(made, "b")), (of_a, of_b))

    def test_the_names_of_rules_are_not_clients(self) -> None:
        made = rewrites(Rewrite(None, [Target("x")]), Rewrite("a", [Target("y")]))
        self.assertEqual(made.choose("a", None, bool), ("a", "y"))
        self.assertEqual(made.choose("made up", None, bool), ("*", "x"))

    def test_sources(self) -> None:
        made = Rewrites()
        made.update("config", [Rewrite("a", [Target("configured")])])
        made.update(
            "kubernetes", [Rewrite("a", [Target("object")], 7.0), Rewrite("b", [Target("object")], 8.0)]
        )
        self.assertEqual((chosen(made, "a"), chosen(made, "b")), ("configured", "object"))
        version = made.version
        made.update("config", [])
        self.assertEqual(chosen(made, "a"), "object")
        self.assertNotEqual(made.version, version)
        made.update("kubernetes", [])
        self.assertFalse(made.active)

    def test_targets_the_largest_share_first(self) -> None:
        self.assertEqual(rewrites(rule("a", 1, 0, 7)).targets("a"), ["t2", "t0"])


if __name__ == "__main__":
    unittest.main()
