"""Weights of revisions: each has its share, sessions stay together, and nothing is lost when one dies."""

import unittest
from collections import Counter
from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fleet import D, P, prompt
from vllm_pd_scheduler.config import ConfigError, SchedulerConfig, parse_config
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.scheduler.revisions import Revisions, Turns
from vllm_pd_scheduler.strategies import strategy_names

positive = st.integers(1, 1000)


def fleet(weights: Mapping[str, int], *described: tuple[InstanceRole, str], **more: object) -> Scheduler:
    """Healthy instances of a role and a revision each: p0, d1, …"""
    registry = Registry()
    for number, (role, revision) in enumerate(described):
        name, host = f"{role[0]}{number}", f"10.0.0.{number + 1}"
        registry.probed(registry.add(PDInstance(name, role, host, 80, revision=revision or None)), None)
    config = SchedulerConfig.model_validate({"revisions": dict(weights), **more})
    return Scheduler(config, registry, seed=1)


def of(endpoint: Endpoint) -> str:
    return endpoint.instance.revision or ""


BOTH = [(role, revision) for revision in ("blue", "green") for role in (P, D) for _ in range(2)]


class TurnsTest(unittest.TestCase):
    @given(weights=st.lists(positive, min_size=1, max_size=6), count=st.integers(1, 300))
    @settings(deadline=None, derandomize=True, max_examples=300)
    def test_each_has_its_share_within_one_request_at_any_time(
        self, weights: Sequence[int], count: int
    ) -> None:
        turns, got, total = Turns(weights), Counter[int](), sum(weights)
        for number in range(1, count + 1):
            got[turns.next()] += 1
            for index, weight in enumerate(weights):
                self.assertLess(abs(got[index] - number * weight / total), 1)

    def test_they_are_spread(self) -> None:
        turns = Turns([1, 1, 2])
        self.assertEqual("".join("abc"[turns.next()] for _ in range(8)), "cabccabc")


class RevisionsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.weights = {"blue": 80, "green": 20}
        self.revisions = Revisions(lambda: self.weights)

    def choose(self, session: str | None = None, *among: str) -> str:
        return self.revisions.choose(among or ("blue", "green"), session, None)

    def test_a_session_stays_while_its_revision_has_weight(self) -> None:
        sessions = [f"s{number}" for number in range(400)]
        before = {session: self.choose(session) for session in sessions}
        self.assertAlmostEqual(Counter(before.values())["green"], 80, delta=30)
        for self.weights in ({"blue": 1, "green": 99}, {"blue": 99, "green": 1}):
            self.assertEqual({session: self.choose(session) for session in sessions}, before)
        self.assertEqual({self.choose(session, "green") for session in sessions}, {"green"})

    def test_each_scheduler_chooses_the_same_for_a_session(self) -> None:
        other = Revisions(lambda: self.weights)
        sessions = [f"s{number}" for number in range(100)]
        found = [self.choose(session) for session in sessions]
        again = [other.choose(("blue", "green"), session, None) for session in reversed(sessions)]
        self.assertEqual(found, again[::-1])

    def test_of_new_sessions_only_the_difference_moves_when_weights_change(self) -> None:
        more = Revisions(lambda: {"blue": 60, "green": 40})
        for number in range(300):
            before = self.choose(f"s{number}")
            if before == "green":
                self.assertEqual(more.choose(("blue", "green"), f"s{number}", None), "green")

    def test_models_take_turns_apart(self) -> None:
        self.weights = {"blue": 1, "green": 1}
        among, found = ("blue", "green"), Counter[tuple[str, str]]()
        for number in range(20):
            model = "ab"[number % 2]
            found[model, self.revisions.choose(among, None, model)] += 1
        self.assertEqual(set(found.values()), {5})


class PicksTest(unittest.TestCase):
    def served(self, scheduler: Scheduler, request: RequestContext) -> tuple[str, str | None]:
        """Revisions of the P and the D of a request that is split if it can be."""
        for prefill in scheduler.pick(P, request):
            decode = scheduler.pick(D, request, beside=prefill)
            return of(prefill), of(decode[0])
        decode = scheduler.pick(D, request)
        return "", of(decode[0]) if decode else None

    @given(
        weights=st.dictionaries(st.sampled_from(["", "a", "b", "c"]), st.integers(0, 50), min_size=1).filter(
            lambda weights: any(weights.values())
        ),
        described=st.lists(st.tuples(st.sampled_from(PD_ROLES), st.sampled_from(["", "a", "b", "c"]))),
        count=st.integers(1, 60),
    )
    @settings(deadline=None, derandomize=True, max_examples=200)
    def test_shares_and_pairs(
        self, weights: Mapping[str, int], described: list[tuple[InstanceRole, str]], count: int
    ) -> None:
        scheduler = fleet(weights, *described)
        roles = {name: {role for role, revision in described if revision == name} for name in "abc"}
        roles[""] = {role for role, revision in described if not revision}
        able = {name: weights[name] for name in weights if weights[name] and roles[name] == {P, D}}
        alone = {name for name in weights if weights[name] and D in roles[name]}
        self.assertEqual(scheduler.can_serve(D, "m"), bool(alone))
        if not alone:
            return  # such a request is refused before anybody is picked
        got = Counter(self.served(scheduler, prompt(model="m")) for _ in range(count))
        total = sum(able.values())
        for name, weight in able.items():
            self.assertLess(abs(got.pop((name, name), 0) - count * weight / total), 1)
        self.assertFalse(able and got, "all are split if that can be")
        self.assertLessEqual({decode for _, decode in got}, alone)

    def test_each_strategy(self) -> None:
        for name in strategy_names():
            scheduler = fleet({"blue": 3, "green": 1}, *BOTH)
            scheduler.strategies.use(name)
            got = Counter(self.served(scheduler, prompt(model="m", now=float(n))) for n in range(40))
            self.assertEqual(got, {("blue", "blue"): 30, ("green", "green"): 10}, name)

    def test_what_is_not_split(self) -> None:
        scheduler = fleet({"blue": 3, "green": 1}, *BOTH)
        got = Counter(of(scheduler.pick(D, prompt(model="m"))[0]) for _ in range(40))
        self.assertEqual(got, {"blue": 30, "green": 10})

    def test_all_picks_for_a_request_are_of_one_revision(self) -> None:
        scheduler = fleet({"blue": 1, "green": 1}, *BOTH)
        for _ in range(10):
            request = prompt(model="m")
            seen = scheduler.preview(D, request, count=4) + scheduler.preview(P, request, count=4)
            seen += scheduler.pick(P, request, count=4) + scheduler.pick(D, request, count=4)
            self.assertEqual({of(each) for each in seen}, {request.revision})

    def test_one_that_dies_gives_its_share_to_the_others(self) -> None:
        scheduler = fleet({"blue": 9, "green": 1}, *BOTH)
        registry = scheduler.registry
        for name in ("d6", "d7"):
            for _ in range(2):
                registry.probed(registry.get(name), "down")
        got = Counter(self.served(scheduler, prompt(model="m")) for _ in range(40))
        self.assertEqual(got, {("blue", "blue"): 40})
        for name in ("d6", "d7"):
            registry.probed(registry.get(name), None)
        got = Counter(self.served(scheduler, prompt(model="m")) for _ in range(40))
        self.assertEqual(got, {("blue", "blue"): 36, ("green", "green"): 4}, "it has nothing to make up for")

    def test_one_whose_p_have_all_failed_a_request_is_left(self) -> None:
        scheduler = fleet({"blue": 1, "green": 1}, *BOTH)
        request = prompt(model="m")
        first = scheduler.pick(P, request, count=4)
        second = scheduler.pick(P, request, count=4, exclude=first)
        self.assertEqual({of(each) for each in (*first, *second)}, {"blue", "green"})
        self.assertEqual({of(each) for each in scheduler.pick(D, request, count=4)}, {of(second[0])})

    def test_no_weight_is_nothing_also_as_a_last_resort(self) -> None:
        scheduler = fleet({"blue": 1, "green": 0}, *BOTH, (P, "red"), (D, "red"), (D, ""))
        registry = scheduler.registry
        blue = [each for each in registry if of(each) == "blue"]
        self.assertEqual(set(scheduler.last_resorts(D, (), "m")), {e for e in blue if e.instance.role is D})
        for each in blue:
            registry.drain(each.id)
        for role in PD_ROLES:
            self.assertEqual(scheduler.pick(role, prompt(model="m"), count=9), [])
            self.assertFalse(scheduler.can_serve(role, "m"))
            self.assertFalse(scheduler.nobody_serves(role, "m"), "that it cannot now is no 404")

    def test_weights_can_change(self) -> None:
        scheduler = fleet({"blue": 1}, *BOTH)
        for weights in ({"blue": 1, "green": 1}, {"green": 1}, {}, {"blue": 0, "green": 1}):
            scheduler.config.take(SchedulerConfig(revisions=weights), ["revisions"])
            scheduler.reconfigured()
            got = {self.served(scheduler, prompt(model="m")) for _ in range(10)}
            expected = {name for name in ("blue", "green") if not weights or weights.get(name)}
            if weights:
                self.assertEqual(got, {(name, name) for name in expected})

    def test_a_full_one_gives_its_turn_to_one_that_is_not(self) -> None:
        scheduler = fleet({"blue": 1, "green": 1}, *BOTH, max_waiting=2)
        registry = scheduler.registry
        for each in registry:
            if of(each) == "green":
                registry.scraped(each, MetricsSnapshot(0.0, waiting=5), 0)
        requests = [prompt(model="m") for _ in range(10)]
        self.assertTrue(all(scheduler.has_room_for(P, each, 0.0) for each in requests))
        self.assertEqual({each.revision for each in requests}, {"blue"})
        for each in registry:
            registry.scraped(each, MetricsSnapshot(1.0, waiting=5), 0)
        waits = prompt(model="m")
        self.assertFalse(scheduler.has_room_for(P, waits, 1.0))
        for each in registry:
            if of(each) == "green":
                registry.scraped(each, MetricsSnapshot(2.0), 0)
        self.assertTrue(scheduler.has_room_for(P, waits, 2.0))
        self.assertEqual(of(scheduler.pick(P, waits)[0]), "green")


class ConfigTest(unittest.TestCase):
    def test_what_is_refused(self) -> None:
        for weights, words in (
            ({"a": 0}, "at least one weight must be above 0"),
            ({"a": -1}, "revisions.a"),
            ({"a": 0.5}, "revisions.a"),
            ({"a" * 129: 1}, "revisions"),
            ([], "revisions"),
        ):
            with self.assertRaisesRegex(ConfigError, words):
                parse_config({"revisions": weights}, "test")


if __name__ == "__main__":
    unittest.main()
