"""Three replicas of the scheduler, two Envoys and a real Valkey or Redis: faults under load harm no request.

``SOAK_SECONDS`` has the faults come again and again for so long, and last longer; the suite has each once.
How long it takes until all count the same is printed, not asserted.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.load import Seen, load
from tests.support.processes import unused_ports
from tests.support.proxy import Proxy, proxy
from tests.support.replicated import Site, replicated
from tests.support.sim_fleet import Fleet
from tests.support.valkey import Server, needs_server, running
from tests.support.waiting import until

pytestmark = needs_server

SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
LONGER_S = 10.0 if SECONDS else 0.0
"""How long a fault lasts after all know of it."""
NEAREST = ("a",), ("b", "c")
"""Of each Envoy the schedulers that it asks while they are healthy; it knows them all."""
HELD = 3
"""Answers, by each Envoy, that run on through a fault."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    arguments = ["--decode-base=0.01", "--step-overhead=0.001", "--max-model-len=16384", "--lease=10"]
    with Fleet(2, 2, arguments=arguments, decode_arguments=["--load-fail-policy=recompute"]) as started:
        yield started


@pytest_asyncio.fixture
async def way(server: Server) -> AsyncIterator[Proxy]:
    """The way of the replica ``c`` to the server."""
    (port,) = unused_ports(1)
    async with proxy(port, server.port) as between:
        yield between


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "server", "appendonly yes") as started:
        yield started


@pytest_asyncio.fixture
async def site(fleet: Fleet, tmp_path: Path, server: Server, way: Proxy) -> AsyncIterator[Site]:
    urls = dict.fromkeys("abc", server.url) | {"c": f"valkey://127.0.0.1:{way.port}"}
    limits = {"strategy": "least_load", "decode_first_byte_timeout": 5.0}
    async with replicated(fleet, tmp_path, server, urls, NEAREST, **limits) as found:
        yield found


# -- faults: each is there while its block runs; what they yield is the replica that is away


Fault = Callable[[Site, Proxy, random.Random], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def server_killed(site: Site, way: Proxy, chance: random.Random) -> AsyncIterator[str]:
    site.server.kill()
    yield ""
    await asyncio.to_thread(site.server.start)


@asynccontextmanager
async def server_stands_still(site: Site, way: Proxy, chance: random.Random) -> AsyncIterator[str]:
    site.server.signal(signal.SIGSTOP)
    yield ""
    await site.until_alone(*site.replicas)
    await asyncio.sleep(LONGER_S)
    site.server.signal(signal.SIGCONT)


@asynccontextmanager
async def partition(site: Site, way: Proxy, chance: random.Random) -> AsyncIterator[str]:
    way.freeze()
    yield ""
    await site.until_alone("c")
    await asyncio.sleep(LONGER_S)
    way.thaw()


@asynccontextmanager
async def scheduler_killed(site: Site, way: Proxy, chance: random.Random) -> AsyncIterator[str]:
    replica = site.replicas[chance.choice("abc")]
    replica.process.signal(signal.SIGKILL)
    replica.process.wait()
    yield replica.name
    replica.start()
    await until(replica.is_ready)


@asynccontextmanager
async def scheduler_stands_still(site: Site, way: Proxy, chance: random.Random) -> AsyncIterator[str]:
    replica = site.replicas[chance.choice("abc")]
    replica.process.signal(signal.SIGSTOP)
    yield replica.name
    for client in site.clients:  # what it has in flight, Envoy has taken from it by then
        await until(lambda client=client: client.healthy_schedulers(len(site.replicas) - 1))
    await asyncio.sleep(LONGER_S)
    replica.process.signal(signal.SIGCONT)
    await until(replica.is_ready)


FAULTS: list[Fault] = [
    server_killed,
    server_stands_still,
    partition,
    scheduler_killed,
    scheduler_stands_still,
]


# -- what clients do meanwhile


@dataclass
class Held:
    """An answer that has begun and runs on."""

    response: aiohttp.ClientResponse
    replica: str
    """Who has chosen."""

    @property
    def decode(self) -> str:
        return self.response.headers["x-pd-decode"]


@asynccontextmanager
async def held(site: Site) -> AsyncIterator[list[Held]]:
    """Answers that run on while the block runs; then their clients leave."""
    body = {"prompt": "p", "max_tokens": 16000, "ignore_eos": True, "stream": True}
    answers = []
    for client in site.clients:
        for _ in range(HELD):
            response = await site.session.post(client.stack.url + "/v1/completions", json=body)
            await response.content.readline()
            assert response.headers["x-pd-prefill"]
            request = response.headers["x-request-id"]
            (owner,) = [name for name, each in site.replicas.items() if await each.chose(request)]
            answers.append(Held(response, owner))
    yield answers
    for answer in answers:
        assert answer.response.connection is not None, "it has gone on all the time"
        answer.response.close()


def _counted(answers: list[Held], lost: str = "") -> dict[str, int]:
    """Return how many of these are at each D, but those of which a replica that is lost knew."""
    return dict(Counter(answer.decode for answer in answers if answer.replica != lost))


@asynccontextmanager
async def loads(site: Site) -> AsyncIterator[list[Seen]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(load(client, 6, stream=True)) for client in site.clients]


async def _pinned(site: Site, blocks: int) -> bool:
    found = [await site.clients[0].json(each.url + "/_sim/stats") for each in site.fleet.prefill]
    return sum(each["pinned"] for each in found) == blocks


async def _through(site: Site, way: Proxy, fault: Fault, chance: random.Random) -> str:
    """Let one fault come and go; return what was measured."""
    async with held(site) as answers:
        await site.agree(_counted(answers))
        async with AsyncExitStack() as stack:
            async with loads(site) as seen:
                await asyncio.gather(*(each.more() for each in seen))
                lost = await stack.enter_async_context(fault(site, way, chance))
                began = time.monotonic()
                await asyncio.gather(*(each.more(60) for each in seen))
            for each in seen:
                each.assert_clean()
            # What a scheduler has in flight when it dies, or Envoy leaves it, nobody counts from then on.
            expected, measured = _counted(answers, lost), ""
            if lost:
                await site.agree(expected, without=lost)
                measured = f"; forgotten {time.monotonic() - began:.2f} s after it was last heard"
                for each in site.replicas.values():
                    if each.name != lost:
                        await each.process.says(f"replica {lost} on ")
                        await each.process.says("is silent: its requests count no more")
        back = time.monotonic()
        await site.agree(expected)
        agreed = time.monotonic() - back
    await site.agree({})
    if lost:  # nobody but the end of a lease frees a hand-off that it had and Envoy did not
        await until(lambda: _pinned(site, 0))
    else:
        await site.clients[0].until_freed()
    answered = sum(len(each.answers) for each in seen)
    name = f"{fault.__name__}{f' ({lost})' if lost else ''}"
    return f"{name}: {answered} answers, no error; all count the same {agreed:.2f} s after its end{measured}"


async def test_faults_harm_no_request(site: Site, way: Proxy) -> None:
    chance = random.Random(20261128)
    end = time.monotonic() + SECONDS
    while True:
        for fault in FAULTS:
            print(await _through(site, way, fault, chance))
        if time.monotonic() >= end:
            break
    for replica in site.replicas.values():
        assert await replica.is_ready()
