"""gRPC health by name: what lives, what serves, and what should be sent anything new."""

import asyncio
import unittest

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.rpc import served
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.envoy.health import LIVENESS, READINESS, SERVER, HealthService

UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = range(4)


class HealthTest(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.knows = True
        self.draining = False
        self.service = HealthService(lambda: self.knows, lambda: self.draining)

    async def check(self, stub: health_pb2_grpc.HealthStub, name: str) -> int:
        request = health_pb2.HealthCheckRequest(service=name)
        return int((await stub.Check(request, timeout=HUNG_S)).status)

    async def test_each_name_at_each_time(self) -> None:
        table = (  # knows, draining, liveness, "", readiness
            (True, False, SERVING, SERVING, SERVING),
            (True, True, SERVING, SERVING, NOT_SERVING),
            (False, False, SERVING, NOT_SERVING, NOT_SERVING),
            (False, True, SERVING, NOT_SERVING, NOT_SERVING),
        )
        async with served(self.service) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for self.knows, self.draining, live, server, ready in table:
                expected = {LIVENESS: live, SERVER: server, **dict.fromkeys(READINESS, ready)}
                found = {name: await self.check(stub, name) for name in expected}
                self.assertEqual(found, expected)
                listed = await stub.List(health_pb2.HealthListRequest(), timeout=HUNG_S)
                self.assertEqual({name: each.status for name, each in listed.statuses.items()}, expected)

    async def test_a_name_that_nobody_knows(self) -> None:
        async with served(self.service) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with self.assertRaises(grpc.aio.AioRpcError) as caught:
                await self.check(stub, "redis")
            self.assertIs(caught.exception.code(), grpc.StatusCode.NOT_FOUND)
            self.assertIn("readiness", str(caught.exception.details()))
            call = stub.Watch(health_pb2.HealthCheckRequest(service="redis"))
            self.assertEqual((await call.read()).status, SERVICE_UNKNOWN)
            self.assertFalse(call.done())

    async def test_a_watcher_is_told_of_each_change(self) -> None:
        async with served(self.service) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            self.knows = False
            ready = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))
            live = stub.Watch(health_pb2.HealthCheckRequest(service="liveness"))
            self.assertEqual((await live.read()).status, SERVING)
            for self.knows, self.draining, expected in (
                (False, False, NOT_SERVING),
                (True, False, SERVING),
                (True, True, NOT_SERVING),
            ):
                message = await asyncio.wait_for(ready.read(), HUNG_S)
                self.assertEqual(message.status, expected)
            self.assertFalse(live.done())


if __name__ == "__main__":
    unittest.main()
