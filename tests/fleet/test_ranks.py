"""An instance with data-parallel ranks: load is a rank's own, all else is the process's."""

import unittest
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.registry import D, P, instance, loaded, prompt
from vllm_pd_scheduler.fleet.breaker import BreakerPolicy
from vllm_pd_scheduler.fleet.condition import reason, told_state
from vllm_pd_scheduler.fleet.registry import DuplicateInstance, HealthPolicy, Registry, UnknownInstance
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance


def ranked(name: str, size: int, role: InstanceRole = D, host: str = "10.0.0.1", port: int = 1) -> PDInstance:
    return replace(instance(name, role, host, port), data_parallel_size=size)


class RanksTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry(HealthPolicy(breaker=BreakerPolicy(failures=3)))
        self.registry.add(ranked("d0", 3))
        self.registry.add(ranked("d1", 2, host="vllm-1"))
        self.registry.add(instance("d2", D, "10.0.0.3"))
        self.d0 = [self.registry.get(f"d0:{rank}") for rank in range(3)]
        self.d1 = [self.registry.get(f"d1:{rank}") for rank in range(2)]

    def well(self) -> None:
        self.registry.resolved(self.d1[0], "10.0.0.2")
        for first in (self.d0[0], self.d1[0], self.registry.get("d2")):
            self.registry.probed(first, None)

    def test_an_endpoint_a_rank(self) -> None:
        ids = ["d0:0", "d0:1", "d0:2", "d1:0", "d1:1", "d2"]
        self.assertEqual([each.id for each in self.registry], ids)
        self.assertEqual([each.rank for each in self.registry], [0, 1, 2, 0, 1, None])
        self.assertIs(self.registry.get("d0"), self.d0[0])
        self.assertEqual(self.registry.ranks_of(self.d0[2]), tuple(self.d0))
        self.assertEqual([len(ranks) for ranks in self.registry.instances()], [3, 2, 1])
        self.assertTrue(self.registry.has_ranks)
        for name in ("d0:3", "d2:0", "d1:", "d"):
            with self.assertRaises(UnknownInstance):
                self.registry.get(name)

    def test_one_place_one_id(self) -> None:
        for double in (ranked("d9", 2), instance("d0", D, "10.0.0.9"), instance("d0:1", D, "10.0.0.9")):
            with self.subTest(double), self.assertRaises(DuplicateInstance):
                self.registry.add(double)

    def test_removal(self) -> None:
        self.registry.remove("d0:1")
        self.assertEqual([each.id for each in self.registry], ["d1:0", "d1:1", "d2"])
        self.assertFalse(any(each.routable for each in self.d0))
        self.registry.remove("d1")
        self.assertFalse(self.registry.has_ranks)
        self.registry.add(ranked("d0", 1))
        self.assertIsNone(self.registry.get("d0").rank)

    def test_one_that_was_removed_is_none_of_those_that_came_after(self) -> None:
        self.well()
        self.registry.remove("d0")
        self.registry.add(ranked("d0", 3))
        self.registry.probed(self.d0[0], None)  # a probe that was under way
        self.assertEqual(self.registry.ranks_of(self.d0[1]), (self.d0[1],))
        self.assertIs(self.registry.get("d0").state, InstanceState.STARTING)

    def test_address_and_health_are_the_process_s(self) -> None:
        self.well()
        self.assertEqual({each.address for each in self.d1}, {"10.0.0.2:1"})
        self.assertEqual(len(self.registry.routable(D)), 6)
        self.assertIs(self.registry.at(D, "10.0.0.2:1"), self.d1[0])
        for _ in range(2):
            self.registry.probed(self.d1[0], "down")
        self.assertEqual({each.state for each in self.d1}, {InstanceState.UNHEALTHY})
        self.assertEqual(len(self.registry.routable(D)), 4)

    def test_a_drain_is_of_all_and_ends_with_the_last(self) -> None:
        self.well()
        held = self.registry.work.reserve(self.d0[2], prompt())
        for name in ("d0", "d0:1"):
            self.registry.drain(name)
            self.assertEqual({each.state for each in self.d0}, {InstanceState.DRAINING})
            self.assertEqual([each.drained for each in self.d0], [True, True, False])
            self.assertFalse(self.registry.drained("d0"))
            self.registry.undrain(name)
            self.assertTrue(all(each.routable for each in self.d0))
        self.registry.drain("d0")
        held.release()
        self.assertTrue(self.registry.drained("d0"))

    def test_load_is_a_rank_s_own(self) -> None:
        self.well()
        self.registry.scraped(self.d0[1], loaded(3, 2), 0)
        self.registry.work.reserve(self.d0[2], prompt(registry=self.registry))
        self.assertEqual([each.requests for each in self.d0], [0, 5, 1])
        self.assertEqual([len(each.holder) > 0 for each in self.d0], [False, False, True])
        self.registry.forget_metrics(self.d0[0])
        self.assertEqual([each.requests for each in self.d0], [0, 0, 1])

    def test_ejection_is_of_the_process(self) -> None:
        self.well()
        for rank in (0, 1, 2):
            self.registry.ends.failed(self.d0[rank], "decode: reset", 0.0)
        self.assertTrue(all(each.ejected for each in self.d0))
        self.assertEqual({reason(each) for each in self.d0}, {"ejected: decode: reset"})
        self.assertEqual(self.registry.routable(D), (*self.d1, self.registry.get("d2")))
        for _ in range(3):  # one process of three is out; half of them would be two
            self.registry.ends.failed(self.d1[0], "decode: reset", 0.0)
        self.assertFalse(any(each.ejected for each in self.d1))

    def test_one_trial_request_for_all_ranks(self) -> None:
        self.well()
        for _ in range(3):
            self.registry.ends.failed(self.d0[0], "decode: reset", 0.0)
        self.registry.probed(self.d0[0], None, 100.0)
        self.assertTrue(all(each.routable and not each.on_trial for each in self.d0))
        trial = self.registry.work.reserve(self.d0[1], prompt())
        self.assertTrue(all(each.on_trial for each in self.d0))
        trial.release()
        self.assertFalse(any(each.on_trial for each in self.d0))
        self.registry.ends.succeeded(self.d0[1])
        self.assertFalse(self.registry.trials)

    def test_a_process_that_hangs_has_no_peer_in_its_own_ranks(self) -> None:
        self.well()
        for number in range(8):
            self.registry.ends.doubtful(self.d0[number % 3], "decode: timeout", 0.0)
        self.assertTrue(all(each.ejected for each in self.d0))

    def test_a_restart_is_of_all(self) -> None:
        self.well()
        self.registry.started(self.d0[0], 1.0)
        held = [self.registry.work.reserve(each, prompt(registry=self.registry)) for each in self.d0]
        self.registry.ends.doubtful(self.d0[0], "decode: timeout", 0.0)
        self.assertTrue(self.registry.started(self.d0[0], 2.0))
        self.assertEqual([each.generation for each in self.d0], [1, 1, 1])
        self.assertEqual([(each.in_flight, len(each.holder)) for each in self.d0], [(0, 0)] * 3)
        self.assertEqual(len({id(each.doubts) for each in self.d0}), 1)
        for each in held:
            each.release()
        self.assertEqual([each.in_flight for each in self.d0], [0] * 3)

    def test_models_and_description_are_the_process_s(self) -> None:
        self.registry.models.listed(self.d0[0], frozenset({"m"}))
        self.assertEqual({each.models.names for each in self.d0}, {frozenset({"m"})})
        described = replace(self.d0[0].instance, revision="7")
        self.registry.describe("d0", described)
        self.assertEqual({each.instance.revision for each in self.d0}, {"7"})


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "probe",
                "down",
                "fail",
                "serve",
                "doubt",
                "drain",
                "undrain",
                "reserve",
                "release",
                "start",
                "move",
            )
        ),
        st.integers(0, 5),
    ),
    max_size=60,
)


class InvariantTest(unittest.TestCase):
    @settings(max_examples=60, deadline=None)
    @given(STEPS)
    def test_ranks_agree_on_what_is_the_process_s(self, steps: list[tuple[str, int]]) -> None:
        """Whatever happens to them, ranks of a process have one state, and those that count add up."""
        registry = Registry(HealthPolicy(breaker=BreakerPolicy(failures=2)))
        registry.add(ranked("a", 3))
        registry.add(ranked("b", 2, host="b"))
        registry.add(instance("c", D, "10.0.0.3"))
        registry.add(ranked("p", 2, P))
        held = []
        for number, (what, at) in enumerate(steps):
            every = list(registry)
            one = every[at % len(every)]
            match what:
                case "probe" | "down":
                    registry.probed(one, None if what == "probe" else "down", float(number))
                case "fail":
                    registry.ends.failed(one, "reset", float(number))
                case "serve":
                    registry.ends.succeeded(one)
                case "doubt":
                    registry.ends.doubtful(one, "timeout", float(number))
                case "drain":
                    registry.drain(one.id)
                case "undrain":
                    registry.undrain(one.instance.instance_id)
                case "reserve":
                    held.append(registry.work.reserve(one, prompt(now=float(number))))
                case "release" if held:
                    held.pop(at % len(held)).release()
                case "start":
                    registry.started(one, float(number))
                case "move":
                    registry.resolved(registry.get("b"), f"10.0.1.{at + 1}")
            for ranks in registry.instances():
                said = {
                    (e.state, told_state(e), e.address, e.on_trial, reason(e), id(e.breaker), id(e.doubts))
                    for e in ranks
                }
                self.assertEqual(len(said), 1, said)
                whole = [set(registry.routable(role)) & set(ranks) for role in InstanceRole]
                self.assertIn(len(whole[0]) + len(whole[1]), (0, len(ranks)))
        for reservation in held:
            reservation.release()
        self.assertEqual({each.in_flight for each in registry}, {0})
