"""``GET /health`` of the ingress: whether a P and a D can serve, however many cannot."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import Client, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

DEAD = 149


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, profile=EngineProfile.instant()) as running:
        yield running


def among_the_dead(fleet: Fleet) -> dict[str, Any]:
    """The configuration of a fleet in which one of 150 can serve."""
    config = fleet.config()
    for offset, role in ((1, "prefill"), (1 + DEAD, "decode")):
        config[f"{role}_instances"] += [
            {"id": f"{role}-dead-{number}", "host": "127.0.0.1", "port": offset + number}
            for number in range(DEAD)
        ]
    return config


@pytest_asyncio.fixture
async def client(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> AsyncIterator[tuple[Client, Any]]:
    stack = Stack(tmp_path)
    with spawned(stack.envoy()), spawned(stack.serve(among_the_dead(fleet))) as scheduler:
        yield Client(session, stack, fleet), scheduler


async def test_one_of_150(client: tuple[Client, Any]) -> None:
    asked, scheduler = client

    async def reads(status: int) -> bool:
        try:
            found = {(await asked.send("GET", path)).status for path in ("/health", "/health?a", "/ping")}
        except aiohttp.ClientConnectionError:
            return False
        return found == {status}

    await until(lambda: reads(200))
    for name in ("prefill-0", "decode-0"):
        asked.fleet.kill(name, signal.SIGKILL)
        await until(lambda: reads(503))
        asked.fleet.restart(name)
        await until(lambda: reads(200))
    scheduler.process.kill()
    await asyncio.to_thread(scheduler.wait)
    assert await reads(200), "what the scheduler has said last"
