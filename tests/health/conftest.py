"""A registry that is watched, with servers behind it."""

from collections.abc import AsyncIterator

import pytest_asyncio

from vllm_pd_scheduler.instance_http.session import open_session

from .instances import Fixture


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
