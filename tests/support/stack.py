"""Fixtures shared by the tests of a module: a simulated fleet, the scheduler and a real Envoy in front."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, fleet: Fleet) -> Stack:
    """One for each fleet, since what a scheduler has learned of its instances stays."""
    return Stack(Path(tmp_path_factory.mktemp("stack")))


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack) -> Iterator[Process]:
    """``vllm-pd-scheduler up`` in front of the fleet."""
    with spawned(stack.up({"strategy": "round_robin", **NO_EJECTION, **fleet.config()})) as process:
        yield process


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=HUNG_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as opened:
        yield opened


@pytest_asyncio.fixture
async def client(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, up: Process
) -> AsyncIterator[Client]:
    """A client of a stack that is ready; afterwards nothing may be in flight, and all faults are undone."""
    client = Client(session, stack, fleet)
    await ready(client, up)
    yield client
    assert "lua" not in up.output, "a filter's script failed"
    await client.undo_faults()
    if up.process.poll() is None:
        await client.until_in_flight(0)
