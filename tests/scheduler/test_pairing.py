"""P hands over only to D that fit it, and is chosen only if there is one."""

import unittest

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fleet import D, P, prompt
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, ConnectorChoice, InstanceRole, PDInstance
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.strategies import strategy_names

instances = st.tuples(
    st.sampled_from(PD_ROLES),
    st.sampled_from([None, "a", "b"]),
    st.sampled_from([None, frozenset("m"), frozenset("n"), frozenset("mn")]),
    st.booleans(),
)


def fleet(*described: tuple[InstanceRole, str | None, frozenset[str] | None, bool]) -> Scheduler:
    """Instances with their revision, their models and whether they can serve."""
    registry = Registry()
    for number, (role, revision, models, healthy) in enumerate(described):
        instance = PDInstance(
            f"{role[0]}{number}", role, f"10.0.0.{number + 1}", 80, models=models, revision=revision
        )
        registry.probed(registry.add(instance), None if healthy else "down")
    return Scheduler(SchedulerConfig(strategy="least_load"), registry, seed=1)


class PairingTest(unittest.TestCase):
    @given(described=st.lists(instances, max_size=10), model=st.sampled_from(["m", "n", None]))
    @settings(deadline=None, derandomize=True, max_examples=300)
    def test_the_rule(
        self,
        described: list[tuple[InstanceRole, str | None, frozenset[str] | None, bool]],
        model: str | None,
    ) -> None:
        """Read from all instances."""
        scheduler = fleet(*described)

        def serve(role: InstanceRole) -> list[str | None]:
            return [
                revision
                for each, revision, models, healthy in described
                if each is role and healthy and (model is None or models is None or model in models)
            ]

        kinds = {revision for _, revision, _, _ in described}
        prefill, decode = serve(P), serve(D)
        if model is None and any(models is not None for _, _, models, _ in described):
            return  # such a request is not split
        allowed = [each for each in prefill if len(kinds) < 2 or each in decode]
        found = scheduler.serving(P, model)
        unlisted = model is not None and not any(m and model in m for r, _, m, _ in described if r is D)
        if not unlisted:
            self.assertEqual(sorted(str(e.instance.revision) for e in found), sorted(map(str, allowed)))
        for picked in scheduler.pick(P, prompt(model=model), count=9):
            beside = scheduler.pick(D, prompt(model=model), count=9, beside=picked)
            if len(kinds) > 1:
                self.assertTrue(beside)
                self.assertEqual({e.instance.revision for e in beside}, {picked.instance.revision})
                fitting = scheduler.fitting(picked, scheduler.registry.endpoints(D))
                self.assertLessEqual(set(beside), set(fitting or ()))
            else:
                self.assertIsNone(scheduler.fitting(picked, scheduler.registry.endpoints(D)))

    def test_each_strategy(self) -> None:
        described = [(role, revision, None, True) for role in (P, D) for revision in ("a", "b", "a", "b")]
        for name in strategy_names():
            scheduler = fleet(*described)
            scheduler.strategies.use(name)
            for number in range(20):
                request = prompt(model="m", now=float(number), session=str(number))
                prefill = scheduler.pick(P, request)[0]
                for decode in scheduler.pick(D, request, count=4, beside=prefill):
                    self.assertEqual(decode.instance.revision, prefill.instance.revision)
                self.assertEqual(
                    len(scheduler.pick(D, request, count=4)), 4, "without a hand-off any will do"
                )

    def test_as_instances_come_and_go(self) -> None:
        scheduler = fleet((P, "a", None, True), (P, "b", None, True), (D, "a", None, True))
        registry = scheduler.registry
        self.assertEqual([e.id for e in scheduler.serving(P, "m")], ["p0"])
        new = registry.add(PDInstance("d9", D, "10.0.1.9", 80, revision="b"))
        self.assertEqual([e.id for e in scheduler.serving(P, "m")], ["p0"])
        registry.probed(new, None)
        self.assertEqual([e.id for e in scheduler.serving(P, "m")], ["p0", "p1"])
        registry.drain("d2")
        self.assertEqual([e.id for e in scheduler.serving(P, "m")], ["p1"])
        registry.remove("d9")
        self.assertEqual([e.id for e in scheduler.serving(P, "m")], [])
        registry.undrain("d2")
        registry.describe("p1", PDInstance("p1", P, "10.0.0.2", 80, revision="a"))
        self.assertEqual([e.id for e in scheduler.serving(P, "m")], ["p0", "p1"])
        self.assertFalse(scheduler.several_kinds)

    def test_an_ejected_p_without_a_partner_is_no_last_resort(self) -> None:
        scheduler = fleet((P, "a", None, True), (P, "b", None, True), (D, "a", None, True))
        registry = scheduler.registry
        for _ in range(3):
            registry.ends.failed(registry.get("p1"), "reset", 0.0)
        self.assertTrue(registry.get("p1").ejected)
        self.assertEqual([e.id for e in scheduler.last_resorts(P, (), "m")], ["p0"])

    def test_hand_off_protocols(self) -> None:
        """None of its own is that of the fleet, named or not."""
        registry = Registry()
        for number, (role, connector) in enumerate(
            [(P, None), (P, "shared_store"), (D, "nixl"), (P, "one_token"), (D, "shared_store")]
        ):
            choice = connector and ConnectorChoice(connector, (("port", number),))
            instance = PDInstance(f"i{number}", role, f"10.0.0.{number + 1}", 80, connector=choice or None)
            registry.probed(registry.add(instance), None)
        scheduler = Scheduler(SchedulerConfig(), registry)
        self.assertEqual([e.id for e in scheduler.serving(P, "m")], ["i0", "i1"])
        for prefill, decode in (("i0", "i2"), ("i1", "i4")):
            found = scheduler.pick(D, prompt(model="m"), count=4, beside=registry.get(prefill))
            self.assertEqual([e.id for e in found], [decode])


if __name__ == "__main__":
    unittest.main()
