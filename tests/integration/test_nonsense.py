"""An instance that answers nonsense, or without end, is no reason for anything but itself to fail."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import web

from tests.support.processes import NO_EJECTION, Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

OK = b"HTTP/1.1 200 OK\r\n\r\n"
RUNNING = b'vllm:num_requests_running{engine="0"} '
NONSENSE: dict[str, tuple[bytes, bytes]] = {
    "a capacity beyond all floats": (
        OK + RUNNING + b'1\nvllm:cache_config_info{block_size="%s",num_gpu_blocks="9"} 1\n' % (b"9" * 400),
        b"",
    ),
    "an encoding that nobody knows": (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=klingon\r\n\r\n" + RUNNING + b"1\n",
        b"",
    ),
    "a page without end": (OK, RUNNING + b"1\n" * 4000),
    "a line without end": (OK + RUNNING, b"1" * 65536),
    "no HTTP": (b"\x16\x03\x01\x02\x00" * 1000, b""),
    "headers without end": (b"HTTP/1.1 200 OK\r\n", b"x-more: and more\r\n" * 1000),
}
"""What it begins with, and what it goes on with for ever."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, profile=EngineProfile.instant()) as running:
        yield running


@contextlib.asynccontextmanager
async def talker(begin: bytes, more: bytes) -> AsyncIterator[tuple[int, list[str]]]:
    """A server that answers all the same; yields its port, and the paths that it was asked for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            asked.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode())
            writer.write(begin)
            while more:
                writer.write(more)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], asked
    finally:
        server.close()


@pytest.mark.parametrize(("begin", "more"), NONSENSE.values(), ids=NONSENSE)
async def test_the_scheduler_starts_and_serves(
    session: aiohttp.ClientSession, tmp_path: Path, fleet: Fleet, begin: bytes, more: bytes
) -> None:
    stack = Stack(tmp_path)
    async with talker(begin, more) as (port, asked):
        config = fleet.config() | {"max_retries": 3, "health_check_interval": 0.2}
        config["decode_instances"].append({"id": "talker", "host": "127.0.0.1", "port": port})
        with spawned(stack.up(config)) as process:
            client = Client(session, stack, fleet)
            await ready(client, process)

            async def probed() -> bool:
                assert (await client.complete()).status == 200
                return asked.count("/metrics") >= 6

            await until(probed)
            _, page = await client.admin("GET", "/metrics")
            assert 'pd_scheduler_scrape_failures_total{instance="decode-0"}' not in page
            assert psutil.Process(process.process.pid).memory_info().rss < 250 << 20
            assert "Traceback" not in process.output, process.output


@pytest.mark.parametrize("status", [500, 503])
async def test_no_header_of_a_decode_instance_keeps_envoy_from_trying_another(
    session: aiohttp.ClientSession, tmp_path: Path, fleet: Fleet, status: int
) -> None:
    """A proxy before it may say that it limits rates, in a header that Envoy itself heeds."""

    async def answer(request: web.BaseRequest) -> web.Response:
        if request.method == "GET":
            return web.Response(text="vllm:num_requests_running 0\n")
        return web.Response(status=status, headers={"x-envoy-ratelimited": "true"})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.SockSite(runner, socket.create_server(("127.0.0.1", 0)))
    await site.start()
    stack = Stack(tmp_path)
    config = fleet.config() | {"strategy": "round_robin", **NO_EJECTION}
    port = runner.addresses[0][1]
    config["decode_instances"].append({"id": "limited", "host": "127.0.0.1", "port": port})
    try:
        with spawned(stack.up(config)) as process:
            client = Client(session, stack, fleet)
            await ready(client, process)
            await until_state(client, "limited", "healthy")
            answers = [await client.complete() for _ in range(4)]
            assert {each.status for each in answers} == {200}
            _, page = await client.admin("GET", "/metrics")
            assert 'pd_scheduler_decode_attempt_failures_total{decode="limited"' in page, "it was asked"
    finally:
        await runner.cleanup()


async def until_state(client: Client, instance: str, state: str) -> None:
    async def reached() -> bool:
        return (await client.states())[instance] == state

    await until(reached)
