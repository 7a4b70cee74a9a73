"""Both event loops, a pool of connections, and servers to send to."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import uvloop

from tests.support.raw_server import RawServer, raw_server
from vllm_pd_scheduler.instance_http.exchange import Destination
from vllm_pd_scheduler.instance_http.pool import ConnectionPool


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """The scheduler runs on uvloop, a script's calls on asyncio's own loop."""
    made: asyncio.AbstractEventLoopPolicy = request.param()
    return made


@pytest_asyncio.fixture
async def server() -> AsyncIterator[RawServer]:
    async with raw_server() as made:
        yield made


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[ConnectionPool]:
    async with ConnectionPool() as made:
        yield made


@pytest.fixture
def deaf() -> Iterator[Destination]:
    """A server whose queue of new connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield "{}:{}".format(*listener.getsockname()), None


@pytest.fixture(autouse=True)
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The event loop logs what nobody has taken care of."""
    with caplog.at_level(logging.WARNING):
        yield
        gc.collect()
    assert not caplog.records, caplog.text
