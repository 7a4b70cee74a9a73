"""Two schedulers and a real Valkey: each instance is probed by one, and both know how it is."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest_asyncio
from aiohttp import web

from tests.health.instances import Server
from tests.support.processes import Stack, spawned
from tests.support.valkey import Server as Valkey
from tests.support.valkey import needs_server, running
from tests.support.waiting import until

pytestmark = needs_server

INSTANCES = 16
LATELY = 4
"""Of the askings of an instance, how many show who probes it."""


@pytest_asyncio.fixture
async def instances() -> AsyncIterator[list[Server]]:
    servers, runners = [Server() for _ in range(INSTANCES)], []
    for server in servers:
        app = web.Application()
        app.router.add_get("/health", server.health)
        app.router.add_get("/metrics", server.metrics)
        app.router.add_get("/v1/models", server.list_models)
        server.page = "vllm:num_requests_running 0\nvllm:num_requests_waiting 7\n"
        runners.append(web.AppRunner(app, shutdown_timeout=1))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        server.port = runners[-1].addresses[0][1]
    yield servers
    for runner in runners:
        await runner.cleanup()


def config(servers: list[Server], valkey: Valkey) -> dict[str, object]:
    """One in which a scheduler asks for models with a key of its own, ``WHO``: so it is known who asks."""
    listed = [
        {"id": f"i{number}", "host": "127.0.0.1", "port": server.port, "api_key": {"env": "WHO"}}
        for number, server in enumerate(servers)
    ]
    return {
        "prefill_instances": listed[::2],
        "decode_instances": listed[1::2],
        "replicas": {"url": valkey.url},
        "health_check_interval": 0.2,
    }


def askers(server: Server) -> set[str]:
    """Who has asked an instance lately."""
    return {str(each).removeprefix("Bearer ") for each in server.authorization[-LATELY:]}


def each_is_one_s(servers: list[Server], of: set[str]) -> bool:
    """Whether each instance is probed by one, and by all of them together just those do."""
    found = [askers(server) for server in servers]
    return all(len(each) == 1 for each in found) and set().union(*found) == of


async def states(session: aiohttp.ClientSession, stack: Stack) -> dict[str, tuple[str, float | None]]:
    """What a scheduler knows of each instance: its state, and how old its load is."""
    async with session.get(f"{stack.admin}/instances") as response:
        listed = (await response.json())["instances"]
    return {each["id"]: (each["state"], each["metrics_age_s"]) for each in listed}


async def test_each_instance_is_probed_by_one_and_by_the_other_when_that_is_gone(
    tmp_path: Path, instances: list[Server], session: aiohttp.ClientSession
) -> None:
    stacks = [Stack(tmp_path / name) for name in ("a", "b")]
    for stack in stacks:
        stack.directory.mkdir()

    async def know(state: str, name: str) -> bool:
        """Whether both say so of an instance, and know the load of all others as it was just now."""
        found = [await states(session, stack) for stack in stacks]
        return all(
            known[name][0] == state and all(age is not None and age < 5.0 for _, age in known.values())
            for known in found
        )

    with (
        running(tmp_path / "valkey") as valkey,
        spawned(stacks[0].serve(config(instances, valkey)), WHO="a") as a,
        spawned(stacks[1].serve(config(instances, valkey)), WHO="b") as b,
    ):
        await until(lambda: each_is_one_s(instances, {"a", "b"}))
        await until(lambda: know("healthy", "i0"))
        instances[0].status = 503
        await until(lambda: know("unhealthy", "i0"))
        instances[0].status = 200
        await until(lambda: know("healthy", "i0"))
        a.signal(signal.SIGKILL)
        await until(lambda: each_is_one_s(instances, {"b"}))
        assert "Traceback" not in a.output + b.output
