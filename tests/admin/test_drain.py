"""Draining over the admin interface: what a call waits for, what it tells, and how to undo it."""

import asyncio
import unittest
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from tests.support.given import give
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.admin import AdminServer
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import UnknownInstance
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance
from vllm_pd_scheduler.router import PDRouter

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def fleet(drain_timeout: float = 10.0) -> PDRouter:
    """A router of a prefill and two decode instances that can serve."""
    router = PDRouter(SchedulerConfig(drain_timeout=drain_timeout))
    for port, (name, role) in enumerate((("p0", P), ("d0", D), ("d1", D)), 8000):
        router.register_instance(PDInstance(name, role, "10.0.0.1", port))
        router.registry.probed(router.registry.get(name), None)
    return router


class UndrainTest(unittest.TestCase):
    def setUp(self) -> None:
        self.router = fleet()
        self.registry = self.router.registry
        self.endpoint = self.registry.get("d0")

    def test_it_takes_requests_again(self) -> None:
        self.router.drain_instance("d0")
        self.router.undrain_instance("d0")
        self.assertIs(self.endpoint.state, InstanceState.HEALTHY)
        self.assertIn(self.endpoint, self.registry.routable(D))

    def test_only_when_its_health_allows(self) -> None:
        self.router.drain_instance("d0")
        for _ in range(2):
            self.registry.probed(self.endpoint, "connection refused")
        self.router.undrain_instance("d0")
        self.assertIs(self.endpoint.state, InstanceState.UNHEALTHY)
        self.assertNotIn(self.endpoint, self.registry.routable(D))

    def test_listeners_hear_of_changes_only(self) -> None:
        changes: list[bool] = []
        self.registry.changes.subscribe(lambda: changes.append(self.endpoint.draining))
        undrain, drain = self.registry.undrain, self.registry.drain
        for call in (undrain, drain, undrain, undrain):
            call("d0")
        self.assertEqual(changes, [True, False])

    def test_an_unknown_id(self) -> None:
        with self.assertRaises(UnknownInstance):
            self.router.undrain_instance("nobody")

    def test_drained_is_when_nothing_is_left(self) -> None:
        endpoint = self.registry.get("p0")
        self.assertFalse(endpoint.drained, "idle, but not draining")
        reservation = self.registry.work.reserve(endpoint)
        self.registry.drain("p0")
        self.assertFalse(endpoint.drained)
        reservation.release()
        self.assertTrue(endpoint.drained)
        give(endpoint, pending_handoffs=1)
        self.assertFalse(endpoint.drained)


class DrainCallTest(unittest.IsolatedAsyncioTestCase):
    async def serve(self, drain_timeout: float = 10.0) -> None:
        self.router = fleet(drain_timeout)
        self.registry = self.router.registry
        self.ready = True
        server = TestServer(AdminServer(self.router, is_ready=lambda: self.ready).application())
        self.client: TestClient[Any, Any] = TestClient(server)
        await self.client.start_server()
        self.addAsyncCleanup(self.client.close)

    async def ask(self, method: str, path: str) -> tuple[int, Any]:
        async with self.client.request(method, path) as response:
            return response.status, await response.json()

    async def start_drain(self, endpoint: Endpoint) -> asyncio.Future[tuple[int, Any]]:
        """Start a call that waits, and return when the instance is draining."""
        draining = asyncio.Event()
        self.registry.changes.subscribe(draining.set)
        call = asyncio.ensure_future(self.ask("POST", f"/instances/{endpoint.id}/drain?wait=true&force=true"))
        await asyncio.wait_for(draining.wait(), HUNG_S)
        return call

    async def test_without_wait_it_answers_at_once(self) -> None:
        await self.serve()
        self.registry.work.reserve(self.registry.get("d0"))
        for query in ("", "?wait=false"):
            status, found = await self.ask("POST", f"/instances/d0/drain{query}")
            self.assertEqual((status, found["state"], found["drained"]), (202, "draining", False))

    async def test_it_waits_for_its_own_requests_only(self) -> None:
        await self.serve()
        endpoint = self.registry.get("d0")
        mine = self.registry.work.reserve(endpoint)
        self.registry.work.reserve(self.registry.get("d1"))
        call = await self.start_drain(endpoint)
        self.assertFalse((await self.ask("GET", "/instances/d0"))[1]["drained"])
        self.assertFalse(call.done())
        mine.release()
        status, found = await asyncio.wait_for(call, HUNG_S)
        self.assertEqual((status, found["id"], found["drained"]), (200, "d0", True))
        self.assertNotIn("remaining", found)
        self.assertTrue((await self.ask("GET", "/instances/d0"))[1]["drained"])

    async def test_a_prefill_instance_waits_for_its_hand_offs(self) -> None:
        await self.serve()
        endpoint = self.registry.get("p0")
        give(endpoint, pending_handoffs=1)
        call = await self.start_drain(endpoint)
        _, found = await self.ask("GET", "/instances?role=prefill")
        shown = found["instances"][0]
        self.assertEqual((shown["pending_handoffs"], shown["drained"]), (1, False))
        self.assertFalse(call.done())
        give(endpoint, pending_handoffs=0)
        status, found = await asyncio.wait_for(call, HUNG_S)
        self.assertEqual((status, found["drained"], found["pending_handoffs"]), (200, True, 0))

    async def test_it_waits_for_what_other_replicas_have_there(self) -> None:
        await self.serve()
        endpoint = self.registry.get("d0")
        mine = self.registry.work.reserve(endpoint)
        endpoint.sent_elsewhere(2, 0)
        call = await self.start_drain(endpoint)
        _, found = await self.ask("GET", "/instances/d0")
        self.assertEqual((found["in_flight"], found["in_flight_elsewhere"], found["drained"]), (3, 2, False))
        endpoint.sent_elsewhere(-2, 0)
        self.assertFalse(call.done())
        endpoint.holds_elsewhere(1)
        mine.release()
        _, found = await self.ask("GET", "/instances/d0")
        self.assertEqual((found["pending_handoffs"], found["drained"]), (1, False))
        endpoint.holds_elsewhere(-1)
        status, found = await asyncio.wait_for(call, HUNG_S)
        self.assertEqual((status, found["drained"]), (200, True))

    async def test_by_the_id_of_a_rank_or_of_the_instance_all_ranks_drain(self) -> None:
        for name in ("d9", "d9:1"):
            with self.subTest(name):
                await self.serve(0.05)
                self.router.register_instance(PDInstance("d9", D, "10.0.0.9", 1, data_parallel_size=2))
                self.registry.probed(self.registry.get("d9"), None)
                held = self.registry.work.reserve(self.registry.get("d9:0"))
                status, found = await self.ask("POST", f"/instances/{name}/drain?wait=true")
                self.assertEqual((status, found["instance"], found["remaining"]["in_flight"]), (200, "d9", 1))
                _, found = await self.ask("GET", "/instances?role=decode")
                shown = [(e["id"], e["rank"], e["state"]) for e in found["instances"][2:]]
                self.assertEqual(shown, [("d9:0", 0, "draining"), ("d9:1", 1, "draining")])
                held.release()
                self.assertEqual((await self.ask("POST", f"/instances/{name}/drain?wait=true"))[0], 200)
                status, found = await self.ask("POST", f"/instances/{name}/undrain")
                self.assertEqual((status, found["state"]), (200, "healthy"))
                async with self.client.delete(f"/instances/{name}") as response:
                    self.assertEqual(response.status, 204)
                self.assertEqual([e.id for e in self.registry.endpoints(D)], ["d0", "d1"])

    async def test_the_ranks_of_the_last_instance_stay(self) -> None:
        await self.serve()
        for name in ("d0", "d1"):
            self.router.unregister_instance(name)
        self.router.register_instance(PDInstance("d9", D, "10.0.0.9", 1, data_parallel_size=2))
        self.registry.probed(self.registry.get("d9"), None)
        status, found = await self.ask("POST", "/instances/d9:1/drain")
        self.assertEqual(status, 409)
        self.assertIn("d9 is the last decode instance", str(found))

    async def test_what_remains_after_the_timeout(self) -> None:
        for drain_timeout in (0.0, 0.05):
            with self.subTest(drain_timeout=drain_timeout):
                await self.serve(drain_timeout)
                endpoint = self.registry.get("p0")
                self.registry.work.reserve(endpoint)
                give(endpoint, pending_handoffs=2)
                status, found = await self.ask("POST", "/instances/p0/drain?wait=true&force=true")
                self.assertEqual((status, found["drained"]), (200, False))
                self.assertEqual(found["remaining"], {"in_flight": 1, "pending_handoffs": 2})

    async def test_undrain_ends_the_wait(self) -> None:
        await self.serve()
        endpoint = self.registry.get("d0")
        self.registry.work.reserve(endpoint)
        call = await self.start_drain(endpoint)
        status, found = await self.ask("POST", "/instances/d0/undrain")
        self.assertEqual((status, found["state"], found["drained"]), (200, "healthy", False))
        status, found = await asyncio.wait_for(call, HUNG_S)
        self.assertEqual((status, found["drained"]), (200, False))
        self.assertEqual(found["remaining"]["in_flight"], 1)

    async def test_a_scheduler_that_ends_waits_no_more(self) -> None:
        await self.serve()
        endpoint = self.registry.get("d0")
        self.registry.work.reserve(endpoint)
        call = await self.start_drain(endpoint)
        self.ready = False
        status, found = await asyncio.wait_for(call, HUNG_S)
        self.assertEqual((status, found["drained"], found["remaining"]["in_flight"]), (200, False, 1))

    async def test_an_instance_that_is_removed_meanwhile_is_waited_for(self) -> None:
        await self.serve()
        endpoint = self.registry.get("d0")
        reservation = self.registry.work.reserve(endpoint)
        call = await self.start_drain(endpoint)
        self.router.unregister_instance("d0")
        self.assertFalse(call.done())
        reservation.release()
        self.assertTrue((await asyncio.wait_for(call, HUNG_S))[1]["drained"])

    async def test_the_last_that_can_serve_stays(self) -> None:
        """A slip would take the whole service down, and a script that drains one after another too."""
        await self.serve()
        last = "is the last {} instance that can serve: add force=true to take it away all the same"
        for path in ("/instances/p0/drain", "/instances/p0/drain?wait=true&force=false"):
            status, found = await self.ask("POST", path)
            self.assertEqual((status, found), (409, {"error": f"p0 {last.format('prefill')}"}))
        self.assertEqual((await self.ask("DELETE", "/instances/p0"))[0], 409)
        self.assertTrue(self.registry.get("p0").routable)
        both = await asyncio.gather(*(self.ask("POST", f"/instances/{name}/drain") for name in ("d0", "d1")))
        self.assertEqual(sorted(status for status, _ in both), [202, 409])
        (left,) = self.registry.routable(D)
        for method, path in (("POST", f"/instances/{left.id}/drain"), ("DELETE", f"/instances/{left.id}")):
            self.assertEqual(
                (await self.ask(method, path))[1], {"error": f"{left.id} {last.format('decode')}"}
            )
        self.assertEqual((await self.ask("POST", f"/instances/{left.id}/drain?force=true"))[0], 202)
        self.assertEqual(self.registry.routable(D), ())
        self.assertEqual((await self.client.delete("/instances/p0?force=true")).status, 204)

    async def test_one_that_serves_nobody_goes_without_force(self) -> None:
        await self.serve()
        for _ in range(2):
            self.registry.probed(self.registry.get("p0"), "connection refused")
        self.assertEqual((await self.ask("POST", "/instances/p0/drain"))[0], 202)
        self.assertEqual((await self.ask("POST", "/instances/p0/drain"))[0], 202)
        self.assertEqual((await self.client.delete("/instances/p0")).status, 204)

    async def test_bad_calls(self) -> None:
        await self.serve()
        self.assertEqual(
            await self.ask("POST", "/instances/d0/drain?wait=yes"),
            (400, {"error": "wait: must be 'true' or 'false'"}),
        )
        self.assertFalse(self.registry.get("d0").draining)
        for path in ("drain?wait=true", "undrain"):
            status, found = await self.ask("POST", f"/instances/nobody/{path}")
            self.assertEqual((status, found), (404, {"error": "no instance has the id 'nobody'"}))
