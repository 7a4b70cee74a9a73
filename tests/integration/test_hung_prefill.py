"""A P that is frozen while requests wait there: another P answers them, long before ``prefill_timeout``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

SETTINGS = {"strategy": "round_robin", "prefill_timeout": 3600.0, "health_check_timeout": 1.0}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 1, profile=EngineProfile.instant()) as running:
        yield running


@pytest.fixture(params=["straight", "listener"])
def up(request: pytest.FixtureRequest, tmp_path: Path, fleet: Fleet) -> Iterator[tuple[Stack, Process]]:
    stack = Stack(tmp_path)
    way = stack.listener if request.param == "listener" else {}
    with spawned(stack.up({**SETTINGS, **fleet.config(), **way})) as process:
        yield stack, process


@pytest_asyncio.fixture
async def client(
    session: aiohttp.ClientSession, up: tuple[Stack, Process], fleet: Fleet
) -> AsyncIterator[Client]:
    made = Client(session, up[0], fleet)
    await ready(made, up[1])
    await made.until_split()
    yield made
    await made.fault("prefill-0")


async def test_what_waits_at_a_p_that_hangs_is_answered_by_another(client: Client) -> None:
    before = (await client.seen_by_all())["prefill-0"]
    await client.fault("prefill-0", delay=3600)
    requests = [asyncio.ensure_future(client.complete()) for _ in range(6)]

    async def delivered() -> bool:
        return len(await client.seen_since("prefill-0", before)) == 3

    await until(delivered)
    with client.frozen("prefill-0"):
        answers = await asyncio.gather(*requests)
        assert [answer.status for answer in answers] == [200] * 6
        assert {answer.headers["x-pd-prefill"] for answer in answers} == {"prefill-1"}
        _, page = await client.admin("GET", "/metrics")
        assert 'pd_scheduler_prefill_failures_total{prefill="prefill-0",reason="hung"} 3.0' in page
        assert (await client.instance("prefill-0"))["in_flight"] == 0
        _, found = await client.admin("GET", "/events")
        assert any(each["text"].startswith("prefill-0 hangs") for each in found["events"])

    async def serves() -> bool:
        return (await client.states())["prefill-0"] == "healthy"

    await until(serves)
