"""The library's interface: instances that are registered, removed and drained."""

import asyncio

from tests.support.routing import Case, D, P
from vllm_pd_scheduler.fleet.registry import DuplicateInstance, UnknownInstance
from vllm_pd_scheduler.models import ConnectorChoice, InstanceRole, PDInstance


class InstancesTest(Case):
    async def test_the_library_interface(self) -> None:
        self.assertEqual([i.instance_id for i in self.router.get_instances(role=P)], ["p0", "p1", "p2"])
        self.assertEqual(len(self.router.get_instances()), 6)
        self.router.unregister_instance("p0")
        self.assertEqual([i.instance_id for i in self.router.get_instances(role=P)], ["p1", "p2"])
        for call in (self.router.unregister_instance, self.router.drain_instance):
            with self.assertRaises(UnknownInstance):
                call("p0")
        with self.assertRaises(DuplicateInstance):
            self.router.register_instance(PDInstance("p1", P, "10.0.0.7", 1))

    async def test_an_instance_that_cannot_be_leaves_all_as_it_was(self) -> None:
        for role, wrong in (
            (P, {"data_parallel_size": 0}),
            (P, {"data_parallel_size": 65}),
            (D, {"data_parallel_size": 1.5}),
            (D, {"data_parallel_size": True}),
            (P, {"connector": ConnectorChoice("nope")}),
            (InstanceRole.ENCODE, {"connector": ConnectorChoice("nixl")}),
        ):
            with self.subTest(wrong):
                with self.assertRaisesRegex(ValueError, "data_parallel_size|nope|nixl"):
                    self.router.register_instance(PDInstance("x", role, "10.0.0.9", 1, **wrong))
                self.router.register_instance(PDInstance("y", D, "10.0.0.8", 1))
                self.router.unregister_instance("y")
                self.assertEqual(len(self.router.get_instances()), 6)

    async def test_a_draining_p_takes_nothing_new(self) -> None:
        self.router.drain_instance("p0")
        for _ in range(4):
            (await self.route()).release()
        self.assertNotIn("p0", self.leg.tried)
        self.assertEqual(len(self.leg.tried), 4)

    async def test_one_that_no_source_names_goes_with_its_last_request(self) -> None:
        """No probe is needed to see that: the next one may be a minute away."""
        for endpoint in list(self.router.registry):
            self.router.unregister_instance(endpoint.id)
        told = [PDInstance("p", P, "10.0.1.1", 1), PDInstance("d", D, "10.0.1.2", 1)]
        self.router.membership.update("file:a", told)
        for endpoint in self.router.registry:
            self.router.registry.probed(endpoint, None)
        self.leg.hold = asyncio.Event()
        routing = asyncio.ensure_future(self.route())
        await self.leg.entered.wait()
        self.router.membership.update("file:a", told[1:])
        self.leg.hold.set()
        forward = await routing
        self.assertSplit(forward, "p")
        await asyncio.sleep(0)
        self.assertEqual([e.id for e in self.router.registry], ["p", "d"], "p has a hand-off for it")
        self.router.membership.update("file:a", [])
        forward.release()
        self.assertEqual(list(self.router.registry), [])

    async def test_one_that_prefills_for_nobody_any_more_goes_too(self) -> None:
        """Its client has left."""
        self.router.unregister_instance("p0")
        self.router.membership.update("file:a", [PDInstance("p", P, "10.0.1.1", 1)])
        self.down("p1", "p2")
        self.router.registry.probed(self.router.registry.get("p"), None)
        self.leg.hold = asyncio.Event()
        routing = asyncio.ensure_future(self.route())
        await self.leg.entered.wait()
        self.router.membership.update("file:a", [])
        routing.cancel()
        await asyncio.wait([routing])
        await asyncio.sleep(0)
        self.assertNotIn("p", [e.id for e in self.router.registry])
