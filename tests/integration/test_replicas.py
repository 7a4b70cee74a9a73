"""Two schedulers of one fleet, each with its Envoy, that meet at a real server, which fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.valkey import Server, needs_server, running
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

pytestmark = needs_server

SLOW = replace(EngineProfile.instant(), decode_base=0.1)


@dataclass
class Replica:
    client: Client
    process: Process

    async def status(self) -> Any:
        status, found = await self.client.admin("GET", "/status")
        assert status == 200, found
        return found["replicas"]

    async def hears(self, count: int) -> None:
        """Wait until so many others are heard, and it is connected."""

        async def heard() -> bool:
            found = await self.status()
            return bool(found["connected"]) and len(found["others"]) == count

        await until(heard)

    async def goes_on_alone(self) -> None:
        async def alone() -> bool:
            _, found = await self.client.admin("GET", "/readyz")
            return "no connection to the other replicas" in found.get("replicas", "")

        await until(alone)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=SLOW, arguments=["--max-model-len=4096"]) as started:
        yield started


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "server") as started:
        yield started


@pytest_asyncio.fixture
async def replicas(fleet: Fleet, server: Server, tmp_path: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    stacks = [Stack(tmp_path / name) for name in ("a", "b")]
    commands = []
    for stack in stacks:
        stack.directory.mkdir()
        meeting = {"url": server.url, "name": stack.directory.name}
        config = {"strategy": "least_load", **NO_EJECTION, **fleet.config(), "replicas": meeting}
        commands.append(stack.up(config))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = [Client(session, stack, fleet) for stack in stacks]
        with spawned(commands[0]) as one, spawned(commands[1]) as two:
            made = [Replica(client, process) for client, process in zip(clients, (one, two), strict=True)]
            for each in made:
                await ready(each.client, each.process)
                await each.client.until_split()
                await each.hears(1)
            yield made[0], made[1]


async def _stream(client: Client) -> aiohttp.ClientResponse:
    """Begin an answer of some seconds."""
    body = {"prompt": "Go on.", "max_tokens": 600, "stream": True}
    answer = await client.session.post(f"{client.stack.url}/v1/completions", json=body)
    assert answer.status == 200
    return answer


async def test_each_sees_the_others_requests_and_spreads_its_own_round_them(
    replicas: tuple[Replica, Replica],
) -> None:
    one, two = (each.client for each in replicas)
    await asyncio.gather(one.until_in_flight(0), two.until_in_flight(0))
    async with asyncio.TaskGroup() as group:
        begun = [group.create_task(_stream(one)) for _ in range(3)]
    answers = [each.result() for each in begun]
    await asyncio.gather(one.until_in_flight(3), two.until_in_flight(3))

    async def spread(*counts: int) -> None:
        """Wait until both see so many at each D: a scrape may be older than the last one."""

        async def seen() -> bool:
            names = ("decode-0", "decode-1")
            found = [sorted([(await each.instance(n))["in_flight"] for n in names]) for each in (one, two)]
            return found == [list(counts)] * 2

        await until(seen)

    await spread(1, 2)
    answers.append(await _stream(two))
    await spread(2, 2)
    for answer in answers:
        answer.close()
    await asyncio.gather(one.until_in_flight(0), two.until_in_flight(0))


async def test_a_change_is_made_by_both_and_kept_over_restarts(
    replicas: tuple[Replica, Replica], server: Server
) -> None:
    one, two = (each.client for each in replicas)
    status, _ = await one.admin("PUT", "/strategy", {"strategy": "round_robin"})
    assert status == 200
    status, _ = await two.admin("POST", "/instances/decode-0/drain")
    assert status == 202

    async def same() -> bool:
        strategy = (await two.admin("GET", "/strategy"))[1]
        draining = (await one.instance("decode-0"))["state"]
        return "round_robin" in str(strategy) and draining == "draining"

    await until(same)
    # The server loses all, and what it had is put back.
    server.kill()
    await asyncio.gather(*(each.goes_on_alone() for each in replicas))
    status, answer = await one.admin("POST", "/instances/decode-0/undrain")
    assert status == 503
    assert "the log of the replicas does not take the change: 127.0.0.1:" in answer["error"]
    assert (await one.complete()).status == (await two.complete()).status == 200
    server.start()
    await asyncio.gather(*(each.hears(1) for each in replicas))
    await until(lambda: '"drained":["decode-0"]' in server.ask("XREVRANGE", "{vllm-pd}:changes", "+", "-"))
    status, _ = await one.admin("POST", "/instances/decode-0/undrain")
    assert status == 200

    async def back() -> bool:
        return bool((await two.instance("decode-0"))["state"] != "draining")

    await until(back)


async def test_while_the_server_stands_still_requests_are_served(
    replicas: tuple[Replica, Replica], server: Server
) -> None:
    one, two = replicas
    server.signal(signal.SIGSTOP)
    for _ in range(5):
        answers = await asyncio.gather(*(each.client.complete() for each in replicas for _ in range(4)))
        assert {answer.status for answer in answers} == {200}
    await asyncio.gather(one.goes_on_alone(), two.goes_on_alone())
    assert (await one.client.admin("GET", "/readyz"))[0] == 200
    server.signal(signal.SIGCONT)
    await asyncio.gather(one.hears(1), two.hears(1))
    await asyncio.gather(one.client.until_in_flight(0), two.client.until_in_flight(0))


async def test_one_that_is_killed_is_forgotten_with_its_requests(replicas: tuple[Replica, Replica]) -> None:
    one, two = replicas
    answer = await _stream(two.client)
    await one.client.until_in_flight(1)
    two.process.process.kill()
    await one.hears(0)
    await one.client.until_in_flight(0)
    answer.close()
    assert "replica b on " in one.process.output
    assert "is silent: its requests count no more" in one.process.output


async def test_the_metrics_say_how_it_is(replicas: tuple[Replica, Replica]) -> None:
    one, two = replicas
    assert (await two.client.complete()).status == 200

    async def values() -> dict[str, float]:
        _, text = await one.client.admin("GET", "/metrics")
        lines = (
            line.rpartition(" ") for line in text.splitlines() if line.startswith("pd_scheduler_replica")
        )
        return {name: float(value) for name, _, value in lines}

    async def heard() -> bool:
        return (await values()).get('pd_scheduler_replica_messages_total{direction="received"}', 0) > 2

    await until(heard)
    found = await values()
    assert found["pd_scheduler_replicas_connected"] == found["pd_scheduler_replicas"] == 1
    assert found["pd_scheduler_replicas_differing"] == 0
    assert found["pd_scheduler_replicas_silent_seconds"] < 3
    assert found['pd_scheduler_replica_message_bytes_total{direction="sent"}'] > 0
    ignored = {name: value for name, value in found.items() if "ignored" in name}
    assert ignored
    assert not any(ignored.values())
