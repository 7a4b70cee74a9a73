"""EDS: what Envoy is told, and when, over a real gRPC stream."""

import asyncio
import unittest
from typing import Any

import grpc
from envoy_data_plane.envoy.config.core.v3 import HealthStatus
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest, DiscoveryResponse
from envoy_data_plane.google.rpc import Status

from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.envoy.eds import SERVICE, TLS_NAMESPACE, TYPE_URL, EndpointDiscovery, load_assignment
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, PDInstance

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def told(assignment: ClusterLoadAssignment) -> list[tuple[str, str, int, HealthStatus]]:
    """Id, address, port and health of each endpoint."""
    found = []
    for lb in assignment.endpoints[0].lb_endpoints:
        socket = lb.endpoint.address.socket_address
        name = lb.metadata.filter_metadata["vllm_pd"].fields["id"].string_value
        found.append((name, socket.address, socket.port_value, HealthStatus(lb.health_status)))
    return found


class AssignmentTest(unittest.TestCase):
    def test_endpoints_of_a_role_in_every_state(self) -> None:
        registry = Registry()
        for number, name in enumerate(("new", "up", "down", "leaving")):
            registry.add(PDInstance(name, D, f"10.0.0.{number}", 8200))
        registry.add(PDInstance("p0", P, "10.0.0.9", 8100))
        registry.probed(registry.get("up"), None)
        registry.probed(registry.get("down"), "gone")
        registry.probed(registry.get("leaving"), None)
        registry.drain("leaving")
        assignment = load_assignment(registry, D)
        self.assertEqual(assignment.cluster_name, "decode")
        self.assertEqual(
            told(assignment),
            [
                ("new", "10.0.0.0", 8200, HealthStatus.UNHEALTHY),
                ("up", "10.0.0.1", 8200, HealthStatus.HEALTHY),
                ("down", "10.0.0.2", 8200, HealthStatus.UNHEALTHY),
                ("leaving", "10.0.0.3", 8200, HealthStatus.DRAINING),
            ],
        )
        self.assertEqual([name for name, *_ in told(load_assignment(registry, P))], ["p0"])

    def test_names_only_once_they_are_resolved(self) -> None:
        registry = Registry()
        endpoint = registry.add(PDInstance("d0", D, "vllm-0", 8200))
        self.assertEqual(told(load_assignment(registry, D)), [])
        registry.resolved(endpoint, "fd00::1")
        self.assertEqual(told(load_assignment(registry, D))[0][1:3], ("fd00::1", 8200))

    def test_tls_and_the_name_to_check(self) -> None:
        registry = Registry()
        registry.add(PDInstance("clear", D, "10.0.0.1", 8200))
        registry.add(PDInstance("secured", D, "10.0.0.2", 8200, tls_name="vllm.example"))
        clear, secured = load_assignment(registry, D).endpoints[0].lb_endpoints
        self.assertEqual((clear.endpoint.hostname, secured.endpoint.hostname), ("", "vllm.example"))
        self.assertNotIn(TLS_NAMESPACE, clear.metadata.filter_metadata)
        self.assertIs(secured.metadata.filter_metadata[TLS_NAMESPACE].fields["tls"].bool_value, True)

    def test_nobody(self) -> None:
        self.assertEqual(told(load_assignment(Registry(), D)), [])


class StreamTest(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.registry = Registry()
        self.registry.add(PDInstance("d0", D, "10.0.0.1", 8200))
        self.registry.add(PDInstance("p0", P, "10.0.0.2", 8100))
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers((EndpointDiscovery(self.registry).handler(),))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.call: Any = self.channel.stream_stream(f"/{SERVICE}/StreamEndpoints")()

    async def asyncTearDown(self) -> None:
        self.call.cancel()
        await self.channel.close()
        await self.server.stop(None)

    async def ask(self, *names: str, **more: Any) -> None:
        await self.call.write(bytes(DiscoveryRequest(resource_names=list(names), type_url=TYPE_URL, **more)))

    async def read(self) -> DiscoveryResponse:
        async with asyncio.timeout(HUNG_S):
            return DiscoveryResponse.parse(await self.call.read())

    async def silent(self) -> bool:
        """Whether nothing more comes; the stream cannot be read any more afterwards."""
        try:
            async with asyncio.timeout(0.1):
                await self.call.read()
        except TimeoutError:
            return True
        return False

    def clusters(self, response: DiscoveryResponse) -> dict[str, list[str]]:
        found = {}
        for resource in response.resources:
            self.assertEqual(resource.type_url, TYPE_URL)
            assignment = ClusterLoadAssignment.parse(resource.value)
            found[assignment.cluster_name] = [name for name, *_ in told(assignment)]
        return found

    async def test_the_clusters_that_were_asked_for(self) -> None:
        await self.ask("decode")
        first = await self.read()
        self.assertEqual((first.type_url, self.clusters(first)), (TYPE_URL, {"decode": ["d0"]}))
        await self.ask("decode", "prefill", version_info=first.version_info, response_nonce=first.nonce)
        second = await self.read()
        self.assertEqual(self.clusters(second), {"decode": ["d0"], "prefill": ["p0"]})
        self.assertNotEqual(first.nonce, second.nonce)

    async def test_every_change_is_sent_at_once(self) -> None:
        await self.ask("decode")
        seen = [await self.read()]
        endpoint = self.registry.add(PDInstance("d1", D, "10.0.0.3", 8200))
        seen.append(await self.read())
        self.registry.probed(endpoint, None)
        seen.append(await self.read())
        self.registry.remove("d0")
        seen.append(await self.read())
        self.assertEqual(
            [self.clusters(response)["decode"] for response in seen],
            [["d0"], ["d0", "d1"], ["d0", "d1"], ["d1"]],
        )
        self.assertEqual(len({response.version_info for response in seen}), 4)

    async def test_changes_that_come_together_are_sent_together(self) -> None:
        await self.ask("decode")
        await self.read()
        for number in range(5):
            self.registry.add(PDInstance(f"e{number}", D, "10.0.1.1", 1 + number))
        self.assertEqual(len(self.clusters(await self.read())["decode"]), 6)
        self.assertTrue(await self.silent())

    async def test_an_acknowledgement_is_not_answered(self) -> None:
        await self.ask("decode")
        first = await self.read()
        await self.ask("decode", version_info=first.version_info, response_nonce=first.nonce)
        self.assertTrue(await self.silent())

    async def test_a_refusal_is_logged_and_not_repeated(self) -> None:
        await self.ask("decode")
        first = await self.read()
        with self.assertLogs("vllm_pd_scheduler.envoy.eds", "ERROR") as logs:
            await self.ask(
                "decode", response_nonce=first.nonce, error_detail=Status(code=3, message="malformed")
            )
            self.assertTrue(await self.silent())
        self.assertEqual(
            [record.getMessage() for record in logs.records], ["Envoy refused the endpoints: malformed"]
        )

    async def test_a_cluster_that_is_no_role(self) -> None:
        await self.ask("other", "decode")
        self.assertEqual(self.clusters(await self.read()), {"decode": ["d0"]})


if __name__ == "__main__":
    unittest.main()
