"""Health while a start waits for sources that say nothing yet."""

from __future__ import annotations

import asyncio
from unittest import mock

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import unused_ports
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.discovery import sources
from vllm_pd_scheduler.discovery.source import Report
from vllm_pd_scheduler.service.app import App

SERVING, NOT_SERVING = 1, 2


class Silent:
    """A source that says nothing until it is told to."""

    name = "silent"

    def __init__(self) -> None:
        self.speak = asyncio.Event()

    async def follow(self, report: Report) -> None:
        await self.speak.wait()
        report.found([])
        await asyncio.get_running_loop().create_future()


async def test_a_start_lives_before_it_is_ready() -> None:
    """A liveness probe must not end a scheduler whose API server is away."""
    grpc_port, health_port, metrics_port, admin_port = unused_ports(4)
    config = parse_config(
        {
            "discovery": [{"type": "kubernetes", "pool": "chat"}],
            "grpc_port": grpc_port,
            "grpc_health_port": health_port,
            "metrics_port": metrics_port,
            "admin_port": admin_port,
        }
    )
    silent = Silent()
    names = ("liveness", "readiness", "inference-extension", "")
    with mock.patch.object(sources, "_made", return_value=silent):
        app = App(config)
        starting = asyncio.ensure_future(app.__aenter__())
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{health_port}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)

                async def told() -> list[int]:
                    found = []
                    for name in names:
                        request = health_pb2.HealthCheckRequest(service=name)
                        answer = await stub.Check(request, timeout=HUNG_S, wait_for_ready=True)
                        found.append(int(answer.status))
                    return found

                assert await told() == [SERVING, NOT_SERVING, NOT_SERVING, NOT_SERVING]
                assert not starting.done(), "it waits for the source's first word"
                silent.speak.set()
                await starting

                async def ready() -> bool:
                    return await told() == [SERVING] * 4

                await until(ready)  # that there is no instance is a word too
        finally:
            silent.speak.set()
            await asyncio.gather(starting, return_exceptions=True)
            await app.__aexit__(None, None, None)
