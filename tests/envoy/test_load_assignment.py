"""What Envoy is told of a role's endpoints, and when that is something new."""

import unittest
from dataclasses import replace
from functools import partial

from envoy.config.core.v3 import health_check_pb2 as health
from envoy.config.endpoint.v3 import endpoint_pb2

from tests.support.eds import told
from tests.support.fleet import D, P
from vllm_pd_scheduler.envoy.load_assignment import TLS_NAMESPACE, TYPE_URL, LoadAssignment
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PDInstance


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        self.assignment = LoadAssignment("decode", partial(self.registry.endpoints, D))

    def add(self, name: str, host: str, port: int = 8200, tls_name: str | None = None) -> None:
        self.registry.add(PDInstance(name, D, host, port, tls_name=tls_name))

    def message(self) -> endpoint_pb2.ClusterLoadAssignment:
        self.assignment.refresh()
        self.assertEqual(self.assignment.resource.type_url, TYPE_URL)
        return endpoint_pb2.ClusterLoadAssignment.FromString(self.assignment.resource.value)

    def told(self) -> list[tuple[str, str, int, int]]:
        return told(self.message())


class WhatTest(Case):
    def test_endpoints_of_a_role_in_every_state(self) -> None:
        for number, name in enumerate(("new", "up", "down", "leaving")):
            self.add(name, f"10.0.0.{number}")
        self.registry.add(PDInstance("p0", P, "10.0.0.9", 8100))
        self.registry.probed(self.registry.get("up"), None)
        self.registry.probed(self.registry.get("down"), "gone")
        self.registry.probed(self.registry.get("leaving"), None)
        self.registry.drain("leaving")
        self.assertEqual(self.message().cluster_name, "decode")
        self.assertEqual(
            self.told(),
            [
                ("new", "10.0.0.0", 8200, health.UNHEALTHY),
                ("up", "10.0.0.1", 8200, health.HEALTHY),
                ("down", "10.0.0.2", 8200, health.UNHEALTHY),
                ("leaving", "10.0.0.3", 8200, health.DRAINING),
            ],
        )
        self.assignment = LoadAssignment("prefill", partial(self.registry.endpoints, P))
        self.assertEqual(self.message().cluster_name, "prefill")
        self.assertEqual([name for name, *_ in self.told()], ["p0"])

    def test_ranks_are_one_host(self) -> None:
        ranked = replace(PDInstance("d0", D, "10.0.0.1", 8200), data_parallel_size=3)
        self.registry.add(ranked)
        self.registry.probed(self.registry.get("d0:0"), None)
        self.assertEqual(self.told(), [("d0", "10.0.0.1", 8200, health.HEALTHY)])
        version = self.assignment.version
        self.registry.work.reserve(self.registry.get("d0:1"))
        self.assertEqual((self.told()[0][0], self.assignment.version), ("d0", version))
        self.registry.drain("d0:2")
        self.assertEqual(self.told(), [("d0", "10.0.0.1", 8200, health.DRAINING)])

    def test_names_only_once_they_are_resolved(self) -> None:
        self.add("d0", "vllm-0")
        self.assertEqual(self.told(), [])
        self.registry.resolved(self.registry.get("d0"), "fd00::1")
        self.assertEqual(self.told(), [("d0", "fd00::1", 8200, health.UNHEALTHY)])

    def test_tls_and_the_name_to_check(self) -> None:
        self.add("clear", "10.0.0.1")
        self.add("secured", "10.0.0.2", tls_name="vllm.example")
        clear, secured = self.message().endpoints[0].lb_endpoints
        self.assertEqual((clear.endpoint.hostname, secured.endpoint.hostname), ("", "vllm.example"))
        self.assertNotIn(TLS_NAMESPACE, clear.metadata.filter_metadata)
        self.assertIs(secured.metadata.filter_metadata[TLS_NAMESPACE].fields["tls"].bool_value, True)

    def test_nobody(self) -> None:
        self.assertEqual(self.told(), [])

    def test_two_names_of_one_address_are_one_endpoint(self) -> None:
        """Envoy takes the first of two with one address, and would leave a healthy one out."""
        for name in ("a", "b"):
            self.add(name, f"{name}.example")
            self.registry.resolved(self.registry.get(name), "10.0.0.1")
        self.registry.probed(self.registry.get("b"), None)
        self.assertEqual(self.told(), [("b", "10.0.0.1", 8200, health.HEALTHY)])
        self.registry.probed(self.registry.get("a"), None)
        self.assertEqual(self.told(), [("a", "10.0.0.1", 8200, health.HEALTHY)])


class VersionTest(Case):
    """It changes with what Envoy is told, and with nothing else."""

    def changes(self) -> bool:
        before = self.assignment.version
        self.assignment.refresh()
        return self.assignment.version != before

    def test_each_change_is_a_new_version(self) -> None:
        self.assertTrue(self.changes(), "the first one")
        self.add("d0", "d0.example")
        self.assertFalse(self.changes(), "it has no address yet")
        endpoint = self.registry.get("d0")
        self.registry.resolved(endpoint, "10.0.0.1")
        self.assertTrue(self.changes())
        self.registry.probed(endpoint, None)
        self.assertTrue(self.changes())
        self.registry.drain("d0")
        self.assertTrue(self.changes())
        self.registry.remove("d0")
        self.assertTrue(self.changes())
        self.assertFalse(self.changes())

    def test_the_other_role_does_not_matter(self) -> None:
        self.assignment.refresh()
        self.registry.add(PDInstance("p0", P, "10.0.0.9", 8100))
        self.registry.probed(self.registry.get("p0"), None)
        self.assertFalse(self.changes())

    def test_one_that_came_back_in_between_is_nothing_new(self) -> None:
        self.add("d0", "10.0.0.1")
        self.assignment.refresh()
        self.registry.remove("d0")
        self.add("d0", "10.0.0.1")
        self.assertFalse(self.changes())

    def test_what_has_not_changed_is_not_encoded_again(self) -> None:
        for number in range(3):
            self.add(f"d{number}", f"10.0.0.{number}")
        self.assignment.refresh()
        before = dict(self.assignment._encoded or {})
        self.registry.probed(self.registry.get("d1"), None)
        self.assignment.refresh()
        kept = [
            key for key, message in (self.assignment._encoded or {}).items() if before.get(key) is message
        ]
        self.assertEqual([key[0] for key in kept], ["d0", "d2"])


if __name__ == "__main__":
    unittest.main()
