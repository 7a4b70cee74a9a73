"""Two endpoint pickers of one pool, each behind a gateway of its own, that meet at a real server."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.gateway import Gateway, GatewayStack, reaches_scheduler
from tests.support.processes import NO_EJECTION, Client, Process, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.valkey import needs_server, running
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

pytestmark = needs_server


@dataclass
class Picker:
    """One picker, and a client of the gateway that asks it."""

    process: Process
    client: Client

    async def status(self) -> dict[str, Any]:
        _, found = await self.client.admin("GET", "/status")
        return dict(found["replicas"])

    async def hears(self, others: int) -> bool:
        """Whether its gateway asks it, all instances can serve, and it hears so many others."""
        assert self.process.process.poll() is None, self.process.output
        try:
            _, found = await self.client.admin("GET", "/instances")
            healthy = all(each["state"] == "healthy" for each in found["instances"])
            heard = len((await self.status())["others"]) == others
            return healthy and heard and await reaches_scheduler(self.client)
        except aiohttp.ClientConnectionError:
            return False

    async def counts(self) -> dict[str, tuple[int, int]]:
        """Return what is in flight on each D, of all and of the other picker."""
        _, found = await self.client.admin("GET", "/instances")
        return {
            each["id"]: (each["in_flight"], each["in_flight_elsewhere"])
            for each in found["instances"]
            if each["role"] == "decode"
        }


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 2, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as started:
        yield started


@pytest.fixture
async def pickers(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> AsyncIterator[tuple[Picker, Picker]]:
    """Two pods of one Deployment: nothing tells them apart, their configuration least."""
    async with AsyncExitStack() as exits:
        server = exits.enter_context(running(tmp_path / "server"))
        found = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            stack = GatewayStack(tmp_path / name, gateway=Gateway(tls=True))
            settings = {"strategy": "least_load", **NO_EJECTION, "replicas": {"url": server.url}}
            config = stack.write_config({**fleet.config(), **settings, "admin_port": stack.admin_port})
            health, metrics = unused_ports(2)
            command = [
                *(sys.executable, "-m", "vllm_pd_scheduler", "epp", f"--config={config}"),
                *(f"--grpc-port={stack.ports.grpc}", f"--grpc-health-port={health}"),
                f"--metrics-port={metrics}",
            ]
            process = exits.enter_context(spawned(command))
            exits.enter_context(spawned(stack.envoy()))
            found.append(Picker(process, Client(session, stack, fleet)))
        one, two = found
        await until(lambda: one.hears(1))
        await until(lambda: two.hears(1))
        yield one, two
        assert all("Traceback" not in each.process.output for each in found)


async def test_what_one_has_sent_where_the_other_knows(pickers: tuple[Picker, Picker]) -> None:
    one, two = pickers
    async with one.client.held_stream() as first:
        busy = first.headers["x-pd-decode"]

        async def known() -> bool:
            return (await two.counts())[busy] == (1, 1)

        await until(known)
        async with two.client.held_stream() as second:
            assert second.headers["x-pd-decode"] != busy

            async def both() -> bool:
                found = await one.counts(), await two.counts()
                return all(sorted(each.values()) == [(1, 0), (1, 1)] for each in found)

            await until(both)
    for each in pickers:
        await each.client.until_in_flight(0)


async def test_a_drain_at_one_reaches_the_other(pickers: tuple[Picker, Picker]) -> None:
    one, two = pickers

    async def is_at_two(state: str) -> bool:
        return bool((await two.client.instance("decode-0"))["state"] == state)

    assert (await one.client.admin("POST", "/instances/decode-0/drain"))[0] == 202
    await until(lambda: is_at_two("draining"))
    answers = [await two.client.complete(prompt=f"Hello {n}") for n in range(4)]
    assert {each.headers["x-pd-decode"] for each in answers} == {"decode-1"}
    assert (await two.client.admin("POST", "/instances/decode-0/undrain"))[0] == 200
    await until(lambda: is_at_two("healthy"))


async def test_one_that_is_killed_is_forgotten_and_the_other_goes_on(pickers: tuple[Picker, Picker]) -> None:
    one, two = pickers
    async with one.client.held_stream() as held:
        lost = held.headers["x-pd-decode"]

        async def known() -> bool:
            return (await two.counts())[lost] == (1, 1)

        await until(known)
        one.process.process.kill()

        async def forgotten() -> bool:
            return (await two.counts())[lost] == (0, 0)

        await until(forgotten)
    assert (await two.status())["others"] == []
    answer = await two.client.complete()
    assert answer.status == 200
    assert "x-pd-prefill" in answer.headers
