"""A registry that is watched, with servers behind it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from vllm_pd_scheduler.instance_http.session import open_session

from .instances import Fixture
from .schedulers import Schedulers


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Fixture]:
    async with open_session() as session:
        fixture = Fixture(session)
        yield fixture
        for monitor in fixture.monitors:
            await monitor.stop()
        for server in fixture.servers:
            server.go.set()
        for raw in fixture.raw_servers:
            raw.close()
        for runner in fixture.runners:
            await runner.cleanup()


@pytest_asyncio.fixture
async def schedulers(fleet: Fixture, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Schedulers]:
    """Nobody yet. Own looks come when a test has so much time pass, not by chance."""
    monkeypatch.setattr("vllm_pd_scheduler.health.shared.random.random", lambda: 0.0)
    made = Schedulers(fleet)
    yield made
    for one in made.all:
        await one.monitor.stop()
