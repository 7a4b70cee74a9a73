"""The library's interface: instances that are registered, removed and drained."""

from tests.support.routing import Case, P
from vllm_pd_scheduler.fleet.registry import DuplicateInstance, UnknownInstance
from vllm_pd_scheduler.models import PDInstance


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

    async def test_a_draining_p_takes_nothing_new(self) -> None:
        self.router.drain_instance("p0")
        for _ in range(4):
            (await self.route()).release()
        self.assertNotIn("p0", self.leg.tried)
        self.assertEqual(len(self.leg.tried), 4)
