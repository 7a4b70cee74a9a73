"""A simulated fleet that takes its time, and everything in front of it as processes that can be killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import Client, Process, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Two P and two D, which hand over by NIXL; a test may name other connectors."""
    arguments = ["--decode-base=0.01", "--step-overhead=0.001", "--load-fail-delay=0.5"]
    # As docs/reliability.md advises for decode: prefill locally when P dies before its blocks were fetched.
    policy = ["--load-fail-policy=recompute"]
    connector = getattr(request, "param", "nixl")
    with Fleet(2, 2, arguments=arguments, decode_arguments=policy, connector=connector) as running:
        yield running


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> dict[str, object]:
    """Settings of the scheduler; a test module may override them, and a test name others."""
    limits = {"decode_first_byte_timeout": 1.0, "prefill_timeout": 1.0, "health_check_timeout": 1.0}
    more = getattr(request, "param", {})
    return {"strategy": "round_robin", "metaserver_port": unused_ports(1)[0], **limits, **more}


@pytest.fixture
def scheduler_and_envoy(
    stack: Stack, fleet: Fleet, settings: dict[str, object]
) -> Iterator[tuple[Process, Process]]:
    """The scheduler and Envoy as two processes, neither of which ends the other."""
    config = {**settings, **fleet.config()}
    with spawned(stack.serve(config)) as scheduler, spawned(stack.envoy()) as envoy:
        yield scheduler, envoy


@pytest_asyncio.fixture
async def client(
    stack: Stack, fleet: Fleet, scheduler_and_envoy: tuple[Process, Process]
) -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session, stack, fleet)
        await ready(client, scheduler_and_envoy[1])

        await client.until_split()  # Envoy's check of the scheduler has succeeded
        yield client
        await _repair(client)


async def _repair(client: Client) -> None:
    """Restart the instances that a test has killed, or that hold what it left; undo the others' faults."""
    for each in client.fleet.instances:
        if not each.alive or (await client.json(each.url + "/_sim/stats"))["pinned"]:
            await asyncio.to_thread(client.fleet.restart, each.id)
        else:
            await client.fault(each.id)
