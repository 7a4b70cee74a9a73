"""Two replicas under load, in each way in which a request can come to its P."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.gateway import GatewayStack
from tests.support.load import load
from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, spawned
from tests.support.sidecar import config_with, sidecars
from tests.support.sim_fleet import Fleet
from tests.support.valkey import needs_server, running
from tests.support.waiting import until

pytestmark = needs_server

WAYS = ("late_binding", "gateway", "gateway late_binding", "sidecar")


@dataclass
class Two:
    """Clients of two schedulers of one fleet, and the processes."""

    clients: list[Client]
    processes: list[Process]

    async def hear_each_other(self) -> None:
        async def heard() -> bool:
            found = [(await each.admin("GET", "/status"))[1]["replicas"] for each in self.clients]
            return all(each["connected"] and each["others"] for each in found)

        await until(heard)


@pytest.fixture(params=WAYS)
async def two(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Two]:
    """Prefills take long enough for both to choose within one delay, and for queues to be."""
    way: str = request.param
    async with AsyncExitStack() as stack:
        arguments = ["--max-model-len=4096", "--prefill-min=0.03", "--decode-base=0.002"]
        fleet = stack.enter_context(Fleet(2, 2, arguments=arguments))
        server = stack.enter_context(running(tmp_path / "server"))
        config: dict[str, Any] = {"strategy": "predicted_latency", **NO_EJECTION, **fleet.config()}
        if "late_binding" in way:
            config["late_binding"] = True
        if way == "sidecar":
            config |= config_with(fleet, await stack.enter_async_context(sidecars(fleet)))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        found = Two([], [])
        for name in ("a", "b"):
            directory = tmp_path / name
            directory.mkdir()
            config["replicas"] = {"url": server.url, "name": name}
            if way.startswith("gateway"):
                made: Stack = GatewayStack(directory)
                process = stack.enter_context(spawned(made.serve(config)))
                stack.enter_context(spawned(made.envoy()))
            else:
                made = Stack(directory)
                process = stack.enter_context(spawned(made.up(config)))
            found.clients.append(Client(session, made, fleet))
            found.processes.append(process)
        for client, process in zip(found.clients, found.processes, strict=True):
            if way.startswith("gateway"):
                await _reached(client, process)
            else:
                await ready(client, process)
                await client.until_split()
        await found.hear_each_other()
        yield found
        for process in found.processes:
            assert "Traceback" not in process.output
            assert "claims what cannot be" not in process.output


async def _reached(client: Client, process: Process) -> None:
    async def split() -> bool:
        assert process.process.poll() is None, process.output
        try:
            return "x-pd-prefill" in (await client.complete()).headers
        except aiohttp.ClientConnectionError:
            return False

    await until(split)


async def test_all_are_answered_and_nothing_is_left(two: Two) -> None:
    async with load(two.clients[0], 6) as seen, load(two.clients[1], 6, stream=True) as others:
        await asyncio.gather(seen.more(100), others.more(100))
    for each in (seen, others):
        each.assert_clean()
        assert all("x-pd-prefill" in answer.headers for answer in each.answers)
        assert len({answer.headers["x-pd-prefill"] for answer in each.answers}) == 2
    for client in two.clients:
        await client.until_in_flight(0)
        await client.until_freed()
    await two.hear_each_other()
