"""EDS: what is answered to what, and when changes are told, over a real gRPC stream."""

import asyncio
import unittest
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import grpc
from envoy.config.core.v3 import health_check_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2

from tests.support.eds import told
from tests.support.fleet import D, P
from tests.support.rpc import served
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.envoy import eds
from vllm_pd_scheduler.envoy.eds import SERVICE, SERVING, EndpointDiscovery, Subscription, Told
from vllm_pd_scheduler.envoy.limits import MAX_MESSAGE_BYTES
from vllm_pd_scheduler.envoy.load_assignment import TYPE_URL, LoadAssignment
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PDInstance


def request(
    *names: str, nonce: str = "", refused: str | None = None, **more: Any
) -> discovery_pb2.DiscoveryRequest:
    made = discovery_pb2.DiscoveryRequest(
        resource_names=names, type_url=TYPE_URL, response_nonce=nonce, **more
    )
    if refused is not None:
        made.error_detail.code, made.error_detail.message = 3, refused
    return made


def clusters(response: discovery_pb2.DiscoveryResponse) -> dict[str, list[str]]:
    """The ids in each cluster of a response."""
    assert response.type_url == TYPE_URL
    found = {}
    for resource in response.resources:
        assert resource.type_url == TYPE_URL
        assignment = endpoint_pb2.ClusterLoadAssignment.FromString(resource.value)
        found[assignment.cluster_name] = [name for name, *_ in told(assignment)]
    return found


class SubscriptionTest(unittest.TestCase):
    """The protocol's rules, without a stream."""

    def setUp(self) -> None:
        self.registry = Registry()
        self.registry.add(PDInstance("d0", D, "10.0.0.1", 8200))
        self.registry.add(PDInstance("p0", P, "10.0.0.2", 8100))
        self.assignments = {
            role.value: LoadAssignment(role.value, partial(self.registry.endpoints, role)) for role in (P, D)
        }
        self.subscription = Subscription(self.assignments, Told())
        self.last = discovery_pb2.DiscoveryResponse()

    def answer(self) -> dict[str, list[str]] | None:
        """Cluster and ids of what is sent now; ``None`` if that is nothing."""
        for assignment in self.assignments.values():
            assignment.refresh()
        data = self.subscription.response()
        if data is None:
            return None
        self.last = discovery_pb2.DiscoveryResponse.FromString(data)
        return clusters(self.last)

    def ask(self, *names: str, nonce: str | None = None, refused: str | None = None) -> None:
        """Send a request that answers the last response, or the one of ``nonce``."""
        given = self.last.nonce if nonce is None else nonce
        self.subscription.asked(request(*names, nonce=given, refused=refused))

    def test_nothing_before_it_is_asked_for(self) -> None:
        self.assertIsNone(self.answer())

    def test_the_clusters_that_were_asked_for(self) -> None:
        self.ask("decode")
        self.assertEqual(self.answer(), {"decode": ["d0"]})
        self.ask("decode", "prefill")
        self.assertEqual(self.answer(), {"prefill": ["p0"]}, "decode it has")

    def test_a_role_of_which_nothing_is_known_is_not_told(self) -> None:
        unknown = {"prefill": LoadAssignment("prefill", partial(self.registry.endpoints, P))}
        subscription = Subscription(unknown, Told())
        subscription.asked(request("prefill"))
        self.assertIsNone(subscription.response())
        unknown["prefill"].refresh()
        self.assertIsNotNone(subscription.response())

    def test_an_acknowledgement_is_not_answered(self) -> None:
        self.ask("decode")
        self.answer()
        self.ask("decode")
        self.assertIsNone(self.answer())

    def test_a_change_of_one_role_does_not_resend_the_other(self) -> None:
        self.ask("decode", "prefill")
        self.assertEqual(self.answer(), {"decode": ["d0"], "prefill": ["p0"]})
        first = self.last
        self.registry.add(PDInstance("d1", D, "10.0.0.3", 8200))
        self.assertEqual(self.answer(), {"decode": ["d0", "d1"]})
        self.assertNotEqual(first.version_info, self.last.version_info)
        self.assertNotEqual(first.nonce, self.last.nonce)
        only_prefill = Subscription(self.assignments, Told())
        only_prefill.asked(request("prefill"))
        only_prefill.response()
        self.registry.drain("d1")
        self.assertEqual(self.answer(), {"decode": ["d0", "d1"]})
        self.assertIsNone(only_prefill.response())

    def test_what_is_asked_for_again_is_sent_again(self) -> None:
        self.ask("decode", "prefill")
        self.answer()
        self.ask("decode")
        self.assertIsNone(self.answer())
        self.ask("decode", "prefill")
        self.assertEqual(self.answer(), {"prefill": ["p0"]})

    def test_a_request_that_answers_an_older_response_is_void(self) -> None:
        self.ask("decode")
        self.answer()
        old = self.last.nonce
        self.registry.add(PDInstance("d1", D, "10.0.0.3", 8200))
        self.answer()
        with self.assertNoLogs("vllm_pd_scheduler.envoy.eds"):
            self.ask("prefill", nonce=old, refused="of the older one")
            self.ask("prefill", nonce="a stranger's")
        self.assertIsNone(self.answer())
        self.registry.drain("d1")
        self.assertEqual(self.answer(), {"decode": ["d0", "d1"]}, "the subscription is as it was")

    def test_a_refusal_is_logged_and_not_repeated(self) -> None:
        self.ask("decode")
        self.answer()
        with self.assertLogs("vllm_pd_scheduler.envoy.eds", "ERROR") as logs:
            self.ask("decode", refused="malformed")
        self.assertEqual(
            [record.getMessage() for record in logs.records], ["Envoy refused the endpoints: malformed"]
        )
        self.assertIsNone(self.answer())
        self.registry.add(PDInstance("d1", D, "10.0.0.3", 8200))
        self.assertEqual(self.answer(), {"decode": ["d0", "d1"]}, "the next change may be better")

    def test_a_refusal_can_ask_for_more(self) -> None:
        self.ask("decode")
        self.answer()
        with self.assertLogs("vllm_pd_scheduler.envoy.eds", "ERROR"):
            self.ask("decode", "prefill", refused="malformed")
        self.assertEqual(self.answer(), {"prefill": ["p0"]})

    def test_a_version_of_a_scheduler_before_a_restart_means_nothing(self) -> None:
        self.subscription.asked(request("decode", version_info="1"))
        self.assertEqual(self.answer(), {"decode": ["d0"]})
        self.assertEqual(self.last.version_info, "1")

    def test_a_cluster_that_is_no_role(self) -> None:
        with self.assertLogs("vllm_pd_scheduler.envoy.eds", "WARNING") as logs:
            self.ask("other", "decode")
        self.assertIn("endpoints of 'other'", logs.output[0])
        self.assertEqual(self.answer(), {"decode": ["d0"]})
        with self.assertNoLogs("vllm_pd_scheduler.envoy.eds"):
            self.ask("other", "decode")
        self.assertIsNone(self.answer())


class Case(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.registry = Registry()
        self.registry.add(PDInstance("d0", D, "10.0.0.1", 8200))
        self.registry.add(PDInstance("p0", P, "10.0.0.2", 8100))
        self.discovery = EndpointDiscovery(self.registry)
        self.wakes = 0
        wake = partial(self.wake, self.discovery._wake)
        self.enterContext(mock.patch.object(self.discovery, "_wake", wake))
        self.channel = await self.enterAsyncContext(served(self.discovery))
        self.call = self.open()

    def wake(self, wake: Callable[[], None]) -> None:
        wake()
        self.wakes += 1

    def open(self) -> Any:
        return self.channel.stream_stream(f"/{SERVICE}/StreamEndpoints")()

    async def ask(self, *names: str, call: Any = None, **more: Any) -> None:
        await (call or self.call).write(request(*names, **more).SerializeToString())

    async def read(self, call: Any = None) -> discovery_pb2.DiscoveryResponse:
        async with asyncio.timeout(HUNG_S):
            return discovery_pb2.DiscoveryResponse.FromString(await (call or self.call).read())

    async def silent(self) -> bool:
        """Whether nothing more comes; the stream cannot be read any more afterwards."""
        try:
            async with asyncio.timeout(0.1):
                await self.call.read()
        except TimeoutError:
            return True
        return False

    async def join_all(self) -> None:
        """Have all changes from now on joined until ``_push_now``."""
        await until(lambda: self.wakes > 0)  # one that comes while a stream writes goes out at once
        self.enterContext(mock.patch.object(eds, "JOIN_S", 1e6))
        self.discovery._pushed_at = asyncio.get_running_loop().time()


class ChangesTest(Case):
    async def test_a_change_is_told(self) -> None:
        await self.ask("decode")
        seen = [await self.read()]
        endpoint = self.registry.add(PDInstance("d1", D, "10.0.0.3", 8200))
        seen.append(await self.read())
        self.registry.probed(endpoint, None)
        seen.append(await self.read())
        self.registry.remove("d0")
        seen.append(await self.read())
        self.assertEqual(
            [clusters(response)["decode"] for response in seen],
            [["d0"], ["d0", "d1"], ["d0", "d1"], ["d1"]],
        )
        self.assertEqual(len({response.version_info for response in seen}), 4)

    async def test_one_after_a_quiet_time_is_told_at_once(self) -> None:
        await self.ask("decode")
        await self.read()
        with mock.patch.object(eds, "JOIN_S", -1e6):  # the last push is long ago
            self.registry.add(PDInstance("d1", D, "10.0.0.3", 8200))
            self.assertEqual(clusters(await self.read()), {"decode": ["d0", "d1"]})

    async def test_changes_that_come_together_are_told_together(self) -> None:
        await self.ask("decode")
        await self.read()
        for number in range(5):
            self.registry.add(PDInstance(f"e{number}", D, "10.0.1.1", 1 + number))
        self.assertEqual(len(clusters(await self.read())["decode"]), 6)
        self.assertTrue(await self.silent())

    async def test_changes_within_the_time_are_told_together(self) -> None:
        await self.ask("decode")
        await self.read()
        await self.join_all()
        for number in range(5):
            self.registry.add(PDInstance(f"e{number}", D, "10.0.1.1", 1 + number))
            await asyncio.sleep(0)
        self.registry.remove("d0")
        self.registry.add(PDInstance("d0", D, "10.0.0.1", 8200))
        self.discovery._push_now()
        self.assertEqual(
            clusters(await self.read()),
            {"decode": [*(f"e{number}" for number in range(5)), "d0"]},
            "and none in between",
        )
        self.assertTrue(await self.silent())

    async def test_one_that_left_and_came_back_within_the_time_is_not_told(self) -> None:
        await self.ask("decode")
        await self.read()
        await self.join_all()
        self.registry.remove("d0")
        self.registry.add(PDInstance("d0", D, "10.0.0.1", 8200))
        self.discovery._push_now()
        self.assertTrue(await self.silent())

    async def test_a_change_is_encoded_once_for_all_streams(self) -> None:
        calls = [self.open() for _ in range(4)]
        for call in calls:
            await self.ask("decode", call=call)
            await self.read(call)
        with mock.patch.object(
            LoadAssignment, "refresh", autospec=True, side_effect=LoadAssignment.refresh
        ) as refresh:
            self.registry.add(PDInstance("d1", D, "10.0.0.3", 8200))
            for call in calls:
                self.assertEqual(clusters(await self.read(call)), {"decode": ["d0", "d1"]})
        self.assertEqual(refresh.call_count, 3, "each cluster once")
        for call in calls:
            call.cancel()

    async def test_a_stream_that_is_not_read_gets_the_newest_state(self) -> None:
        await self.ask("decode")
        await self.read()
        for number in range(300):
            self.registry.add(PDInstance(f"e{number}", D, "10.0.1.1", 1 + number))
            self.discovery._push_now()
            await asyncio.sleep(0)
        seen = 1
        while seen < 301:
            seen = len(clusters(await self.read())["decode"])
        self.assertTrue(await self.silent())


class StreamsTest(Case):
    async def test_one_that_ends_leaves_no_task_behind(self) -> None:
        await self.ask("decode")
        await self.read()  # the server and the channel have the tasks that they keep
        before = len(asyncio.all_tasks())

        async def left() -> bool:
            return len(asyncio.all_tasks()) == before and len(self.discovery._news) == 1

        for round_ in range(3):
            calls = [self.open() for _ in range(5)]
            for call in calls:
                await self.ask("decode", call=call)
                await self.read(call)
            for number in range(3):
                self.registry.add(PDInstance(f"e{round_}.{number}", D, "10.0.1.1", 1 + 3 * round_ + number))
                for call in calls:
                    await self.read(call)
            self.assertGreater(len(asyncio.all_tasks()), before)
            for number, call in enumerate(calls):
                if number % 2:
                    call.cancel()
                else:
                    await call.done_writing()
                    self.assertIs(await call.read(), grpc.aio.EOF)
            try:
                await until(left)
            except TimeoutError:
                self.fail(f"{before}: {asyncio.all_tasks()}")

    async def test_what_is_no_request_ends_the_stream(self) -> None:
        for data, code in (
            (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (b"\0" * (MAX_MESSAGE_BYTES + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with self.subTest(code), self.assertLogs("vllm_pd_scheduler", "WARNING"):
                call = self.open()
                await self.ask("decode", call=call)
                await self.read(call)
                await call.write(data)
                self.assertIs(await call.code(), code)
        await self.ask("decode")
        self.assertEqual(clusters(await self.read()), {"decode": ["d0"]}, "the others go on")


class ServingTest(Case):
    """The cluster by which Envoy knows whether a P and a D can serve."""

    async def test_one_host_or_none(self) -> None:
        """However many there are, and when both roles have one."""
        for number in range(1, 150):
            for role in (P, D):
                self.registry.add(PDInstance(f"{role[0]}{number}", role, f"10.1.0.{number}", 80))
        serving = self.discovery._assignments[SERVING]

        def hosts() -> list[tuple[str, int]]:
            serving.refresh()
            message = endpoint_pb2.ClusterLoadAssignment.FromString(serving.resource.value)
            return [(name, health) for name, _, _, health in told(message)]

        self.assertEqual(hosts(), [])
        self.registry.probed(self.registry.get("d9"), None)
        self.assertEqual(hosts(), [])
        self.registry.probed(self.registry.get("p8"), None)
        self.assertEqual(hosts(), [("d9", health_check_pb2.HEALTHY)])
        self.registry.probed(self.registry.get("d3"), None)
        self.assertEqual(len(hosts()), 1)
        self.registry.drain("p8")
        self.assertEqual(hosts(), [])

    async def test_it_is_told_after_the_instances(self) -> None:
        """Each cluster has a stream of its own, and comes when it likes."""
        calls = [self.open() for _ in range(3)]
        for name, call in zip((SERVING, "prefill", "decode"), calls, strict=True):
            await self.ask(name, call=call)
        self.assertEqual(
            [clusters(await self.read(call)) for call in calls],
            [{SERVING: []}, {"prefill": ["p0"]}, {"decode": ["d0"]}],
        )

    async def test_it_is_not_told_alone(self) -> None:
        await self.ask(SERVING)
        self.assertTrue(await self.silent())

    async def test_it_does_not_wait_long_for_streams_that_another_scheduler_has(self) -> None:
        with mock.patch.object(eds, "APART_S", 0.01):
            await self.ask(SERVING)
            self.assertEqual(clusters(await self.read()), {SERVING: []})


if __name__ == "__main__":
    unittest.main()
