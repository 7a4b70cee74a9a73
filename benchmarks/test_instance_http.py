"""What a POST to an instance costs: 2 KB there and 1 KB back, on connections that stay open.

Both clients take turns with one server in a process of its own; CPU is this process's alone. ``REQUESTS`` a
turn, ``TURNS`` turns.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import pytest
import uvloop

from vllm_pd_scheduler.instance_http.bounded_read import read_at_most
from vllm_pd_scheduler.instance_http.pool import ConnectionPool
from vllm_pd_scheduler.instance_http.session import open_session

PATH = "/v1/completions"
BODY = b"b" * 2048
ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Sat, 28 Nov 2026 06:06:57 GMT\r\nserver: uvicorn\r\ncontent-length: 1024\r\n"
    b"content-type: application/json\r\n\r\n" + b"a" * 1024
)
HEADERS = {"x-request-id": "a" * 36, "authorization": "Bearer key", "content-type": "application/json"}
LIMIT = 1 << 20
TIMEOUT_S = 120.0
AT_ONCE = 16
REQUESTS = int(os.environ.get("REQUESTS", "4000"))
TURNS = int(os.environ.get("TURNS", "5"))

Client = Callable[[int], Awaitable[None]]


class Server(asyncio.Protocol):
    """Answers without looking at more than the end of a request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        if data.endswith(BODY[-64:]):
            self.transport.write(ANSWER)


def serve(told: Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    yield int(ours.recv())
    process.terminate()
    process.join()


async def cpu(client: Client) -> float:
    """Return the microseconds of CPU that a request takes, with some at once."""
    before = time.process_time()
    await asyncio.gather(*(client(REQUESTS // AT_ONCE) for _ in range(AT_ONCE)))
    return (time.process_time() - before) / REQUESTS * 1e6


async def compare(port: int) -> dict[str, float]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with open_session() as session, ConnectionPool() as pool:

        async def by_aiohttp(count: int) -> None:
            for _ in range(count):
                async with session.post(
                    f"http://127.0.0.1:{port}{PATH}",
                    data=BODY,
                    headers=HEADERS,
                    timeout=timeout,
                    allow_redirects=False,
                ) as response:
                    assert len(await read_at_most(response, LIMIT)) == 1024

        async def by_pool(count: int) -> None:
            to = (f"127.0.0.1:{port}", None)
            for _ in range(count):
                sent = pool.post(to, PATH, HEADERS, BODY, limit=LIMIT, timeout=TIMEOUT_S)
                assert len((await sent).body) == 1024

        clients = {"aiohttp": by_aiohttp, "pool": by_pool}
        found: dict[str, list[float]] = {name: [] for name in clients}
        for _ in range(TURNS):
            for name, client in clients.items():
                found[name].append(await cpu(client))
    return {name: statistics.median(each) for name, each in found.items()}


def test_post(benchmark: Any, port: int) -> None:
    measured = benchmark.pedantic(lambda: uvloop.run(compare(port)), rounds=1)
    benchmark.extra_info.update(measured)
    ratio = measured["aiohttp"] / measured["pool"]
    print(f"\naiohttp {measured['aiohttp']:.1f} µs, pool {measured['pool']:.1f} µs of CPU: {ratio:.1f} to 1")
