"""Who is known to lack a model gets no request for it while others serve it."""

import unittest
from dataclasses import replace
from typing import Any
from unittest import mock

from tests.support.fleet import D, P, prompt, scheduler_of
from vllm_pd_scheduler.admission.dispatcher import Dispatcher
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import ANY_MODEL, PD_ROLES, InstanceRole
from vllm_pd_scheduler.scheduler import pools
from vllm_pd_scheduler.strategies import strategy_names

BASE, LORA, OTHER = "base", "lora", "other"


class PoolsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.start()

    def start(self, **config: Any) -> None:
        self.scheduler = scheduler_of(4, 4, **config)
        self.registry = self.scheduler.registry

    def serves(self, name: str, *models: str) -> None:
        self.registry.models.listed(self.registry.get(name), frozenset(models))

    def all_serve(self, *models: str) -> None:
        for endpoint in self.registry:
            self.serves(endpoint.id, *models)

    def chosen(self, model: str | None, role: InstanceRole = P) -> set[str]:
        """Whom many picks choose."""
        found = set()
        for now in range(40):
            (endpoint,) = self.scheduler.pick(role, prompt(model=model, now=float(now), session=str(now)))
            found.add(endpoint.id)
        return found

    def test_one_without_the_adapter_gets_none_of_its_requests(self) -> None:
        for name, role in ((name, role) for name in strategy_names() for role in PD_ROLES):
            with self.subTest(name, role=role):
                self.start(strategy=name)
                self.all_serve(BASE, LORA)
                initial = role[0]
                self.serves(f"{initial}2", BASE)  # restarted without it
                everyone = {f"{initial}{number}" for number in range(4)}
                self.assertEqual(self.chosen(LORA, role), everyone - {f"{initial}2"})
                self.assertEqual(self.chosen(BASE, role), everyone)

    def test_one_with_another_model(self) -> None:
        for role in PD_ROLES:
            self.all_serve(BASE)
            self.serves(f"{role[0]}1", OTHER)
            self.assertEqual(self.chosen(OTHER, role), {f"{role[0]}1"})
            self.assertNotIn(f"{role[0]}1", self.chosen(BASE, role))

    def test_a_model_that_nobody_lists_reaches_nobody(self) -> None:
        for role in PD_ROLES:
            self.all_serve(BASE)
            self.serves(f"{role[0]}1", OTHER)
            self.assertEqual(self.scheduler.pick(role, prompt(model="unheard of")), [])
            self.assertTrue(self.scheduler.nobody_serves(role, "unheard of"))
            self.assertFalse(self.scheduler.can_serve(role, "unheard of"))
            for model in (None, "", BASE, OTHER):
                self.assertFalse(self.scheduler.nobody_serves(role, model))
            self.assertEqual(len(self.chosen(None, role)), 4)
            self.assertEqual(len(self.chosen("", role)), 4)

    def test_a_model_that_nobody_lists_while_not_all_have_said(self) -> None:
        """One of those may have it; if none of them can serve, the engines say what is wrong."""
        self.all_serve(BASE)
        self.registry.models.listed(self.registry.get("p1"), None)
        self.assertFalse(self.scheduler.nobody_serves(P, "unheard of"))
        self.assertEqual(self.chosen("unheard of"), {"p1"})
        self.registry.drain("p1")
        self.assertEqual(self.chosen("unheard of"), {"p0", "p2", "p3"})

    def test_names_that_nobody_has_take_no_memory(self) -> None:
        self.all_serve(BASE)
        pools = self.scheduler._pools[D]
        for number in range(1000):
            self.assertEqual(self.scheduler.pick(D, prompt(model=f"made up {number}")), [])
        self.assertLess(len(pools._by_model), 5)

    def test_configured_models(self) -> None:
        """What an instance lists does not count then, but for one that may serve any."""
        self.all_serve(BASE)
        for name, models in (("p0", {OTHER}), ("p1", {ANY_MODEL, LORA}), ("p2", {BASE, LORA})):
            instance = replace(self.registry.get(name).instance, models=frozenset(models))
            self.registry.describe(name, instance)
        self.assertEqual(self.chosen(OTHER), {"p0", "p1"})
        self.assertEqual(self.chosen(LORA), {"p1", "p2"})
        self.assertEqual(self.chosen(BASE), {"p1", "p2", "p3"})
        self.assertEqual(self.chosen("unheard of"), {"p1"})
        self.assertFalse(self.scheduler.nobody_serves(P, "unheard of"))
        self.registry.started(self.registry.get("p0"), 1.0)
        self.registry.started(self.registry.get("p0"), 2.0)
        self.assertEqual(self.registry.get("p0").models.names, {OTHER}, "a restart changes nothing of that")

    def test_one_that_does_not_say_may_serve_all(self) -> None:
        self.all_serve(BASE)
        self.serves("p1", OTHER)
        self.registry.models.listed(self.registry.get("p2"), None)
        self.serves("p3")
        self.assertEqual(self.chosen(OTHER), {"p1", "p2", "p3"})
        self.assertEqual(self.chosen(BASE), {"p0", "p2", "p3"})

    def test_an_adapter_that_is_loaded_counts_from_the_next_probe_on(self) -> None:
        self.all_serve(BASE)
        self.assertTrue(self.scheduler.nobody_serves(P, LORA))
        self.serves("p0", BASE, LORA)
        self.assertEqual(self.chosen(LORA), {"p0"})
        self.serves("p3", BASE, LORA)
        self.assertEqual(self.chosen(LORA), {"p0", "p3"})
        for name in ("p0", "p3"):
            self.registry.models.listed(self.registry.get(name), None)
        self.assertEqual(self.chosen(LORA), {"p0", "p3"})

    def test_the_roles_are_apart(self) -> None:
        self.all_serve(BASE)
        self.serves("d0", BASE, LORA)
        self.assertEqual(self.chosen(LORA, D), {"d0"})
        self.assertEqual(self.scheduler.pick(P, prompt(model=LORA)), [])

    def test_a_models_only_instance_that_is_away_is_not_replaced_by_a_404(self) -> None:
        self.all_serve(BASE)
        self.serves("d1", OTHER)
        self.registry.drain("d1")
        self.assertEqual(self.scheduler.pick(D, prompt(model=OTHER)), [])
        self.assertFalse(self.scheduler.can_serve(D, OTHER))
        self.assertTrue(self.scheduler.can_serve(D, BASE))
        self.registry.undrain("d1")
        for _ in range(3):
            self.registry.ends.failed(self.registry.get("d1"), "reset", 0.0)
        self.assertEqual(self.scheduler.pick(D, prompt(model=OTHER)), [])
        self.assertEqual(self.scheduler.last_resorts(D, (), OTHER), [self.registry.get("d1")])
        self.assertNotIn(self.registry.get("d1"), self.scheduler.last_resorts(D, (), BASE))
        self.assertTrue(self.scheduler.can_serve(D, OTHER))

    def test_a_request_waits_for_an_instance_of_its_model(self) -> None:
        self.start(max_in_flight_tokens=1500)
        self.all_serve(BASE)
        self.serves("p1", OTHER)
        dispatcher = Dispatcher(self.scheduler)
        first, second, third = (Ticket(prompt(2000.0, model=m), P) for m in (OTHER, OTHER, BASE))
        for ticket in (first, second, third):
            dispatcher.submit(ticket, 0.0)
        self.assertTrue(first.settled)
        self.assertFalse(second.settled, "the others have room, but not its model")
        self.assertTrue(third.settled)
        assert isinstance(first.outcome, Reservation)
        first.outcome.release(1.0)
        dispatcher.dispatch(1.0)
        assert isinstance(second.outcome, Reservation)
        self.assertEqual(second.outcome.endpoint.id, "p1")

    def test_a_large_part_is_sampled_and_a_small_one_is_not(self) -> None:
        self.scheduler = scheduler_of(400, 1)
        self.registry = self.scheduler.registry
        self.all_serve(BASE)
        own = self.registry.endpoints(P)[::100]
        for endpoint in own:
            self.serves(endpoint.id, BASE, LORA)
        self.assertEqual(self.chosen(LORA), {e.id for e in own})
        self.assertGreater(len(self.chosen(BASE)), 30)

    def test_a_fleet_of_one_model_is_looked_at_once(self) -> None:
        self.all_serve(BASE, LORA)
        with (
            mock.patch.object(pools, "_may_serve", side_effect=AssertionError),
            mock.patch.object(pools.Pools, "_pool", autospec=True, side_effect=pools.Pools._pool) as made,
        ):
            for model in (BASE, LORA, None):
                self.chosen(model)
            self.assertEqual(made.call_count, 1)
            self.all_serve(BASE, LORA)
            self.chosen(LORA)
            self.assertEqual(made.call_count, 1, "a probe that says nothing new changes nothing")

    def test_models_with_the_same_instances_share_what_is_known_of_them(self) -> None:
        self.all_serve(BASE)
        self.serves("p1", BASE, LORA, OTHER)
        pools = self.scheduler._pools[P]
        self.assertIs(pools.of(LORA), pools.of(OTHER))
        self.assertIsNot(pools.of(LORA), pools.of(BASE))


if __name__ == "__main__":
    unittest.main()
