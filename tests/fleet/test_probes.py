"""What probes make of an instance."""

import unittest

from tests.support.registry import D, instance
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.fleet.registry import HealthPolicy, Registry
from vllm_pd_scheduler.models import InstanceState


class ProbesTest(unittest.TestCase):
    def states(self, policy: HealthPolicy, probes: str) -> str:
        """State after each probe: '+' a success, '-' a failure; 'H' healthy, 'u' not."""
        registry = Registry(policy)
        endpoint = registry.add(instance())
        seen = ""
        for probe in probes:
            registry.probed(endpoint, None if probe == "+" else "down")
            seen += "H" if endpoint.routable else "u"
            self.assertEqual(endpoint.routable, registry.routable(D) == (endpoint,))
        return seen

    def test_thresholds(self) -> None:
        cases = [
            # unhealthy, healthy, probes, states
            (2, 1, "+-+--+-", "HHHHuHH"),
            (1, 1, "+-+-", "HuHu"),
            (3, 1, "+--+---", "HHHHHHu"),
            (1, 3, "+-++-+++", "Huuuuuu" + "H"),
            (2, 2, "-+-++--", "uuuuHHu"),
            (5, 5, "-", "u"),  # the first probe decides alone
            (5, 5, "+", "H"),
        ]
        for unhealthy, healthy, probes, states in cases:
            with self.subTest(probes, unhealthy=unhealthy, healthy=healthy):
                self.assertEqual(self.states(HealthPolicy(unhealthy, healthy), probes), states)

    def test_listeners_hear_of_changes_only(self) -> None:
        registry = Registry()
        endpoint = registry.add(instance())
        heard: list[InstanceState] = []
        registry.changes.subscribe(lambda: heard.append(endpoint.state))
        for problem in (None, None, "x", None, "x", "x", "x", None):
            registry.probed(endpoint, problem)
        self.assertEqual(heard, [InstanceState.HEALTHY, InstanceState.UNHEALTHY, InstanceState.HEALTHY])

    def test_the_reason_is_the_last_probe(self) -> None:
        registry = Registry()
        endpoint = registry.add(instance())
        self.assertEqual(reason(endpoint), "not probed yet")
        registry.probed(endpoint, "/health answers 503")
        self.assertEqual(reason(endpoint), "/health answers 503")
        registry.probed(endpoint, None)
        self.assertEqual(reason(endpoint), "")
