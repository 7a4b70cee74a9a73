"""A running fleet, and a client for it."""

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
import pytest_asyncio

from tests.support.sim import Client
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    arguments = ["--load-fail-delay=0.02", "--max-model-len=4096"]
    with Fleet(prefill=2, decode=2, profile=EngineProfile.instant(), arguments=arguments) as running:
        yield running


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        yield Client(session)
