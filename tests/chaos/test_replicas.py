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
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml

from tests.support.load import Seen, load
from tests.support.processes import Client, Process, Stack, ready, spawned, unused_ports
from tests.support.proxy import Proxy, proxy
from tests.support.sim_fleet import Fleet
from tests.support.valkey import Server, needs_server, running
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.envoy.schedulers import SchedulerAddress

pytestmark = needs_server

SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
LASTS_S = 10.0 if SECONDS else 2.0
"""How long the server is split from a replica, or stands still beside the load; a scheduler too."""
NEAREST = ("a",), ("b", "c")
"""Of each Envoy the schedulers that it asks while they are healthy; it knows them all."""
HELD = 3
"""Answers, by each Envoy, that run on through a fault."""


@dataclass
class Replica:
    """One scheduler."""

    name: str
    stack: Stack
    config: dict[str, Any]
    processes: ExitStack
    process: Process = field(init=False)

    def start(self) -> None:
        self.process = self.processes.enter_context(spawned(self.stack.serve(self.config)))

    async def in_flight(self, session: aiohttp.ClientSession) -> dict[str, int]:
        """Return what it counts as in flight, its own and the others', by instance."""
        async with session.get(f"{self.stack.admin}/instances") as response:
            found = await response.json()
        return {each["id"]: each["in_flight"] for each in found["instances"] if each["in_flight"]}

    async def chose(self, session: aiohttp.ClientSession, request: str) -> bool:
        async with session.get(f"{self.stack.admin}/decisions?request_id={request}") as response:
            return bool((await response.json())["decisions"])

    async def is_ready(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.stack.admin}/readyz") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


@dataclass
class Site:
    """All that runs."""

    session: aiohttp.ClientSession
    fleet: Fleet
    server: Server
    way: Proxy
    """Of the replica ``c`` to the server."""
    replicas: dict[str, Replica]
    clients: list[Client]
    """One of each Envoy."""

    async def agree(self, in_flight: dict[str, int], without: str = "") -> None:
        """Wait until all replicas but one count this."""

        counted: dict[str, dict[str, int]] = {}

        async def all_do() -> bool:
            for each in self.replicas.values():
                if each.name != without:
                    counted[each.name] = await each.in_flight(self.session)
            return all(each == in_flight for each in counted.values())

        try:
            await until(all_do)
        except TimeoutError:
            raise AssertionError(f"in flight are {in_flight}, counted {counted}") from None


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    arguments = ["--decode-base=0.01", "--step-overhead=0.001", "--max-model-len=16384", "--lease=10"]
    with Fleet(2, 2, arguments=arguments, decode_arguments=["--load-fail-policy=recompute"]) as started:
        yield started


@pytest_asyncio.fixture
async def site(fleet: Fleet, tmp_path: Path) -> AsyncIterator[Site]:
    timeout, no_limit = aiohttp.ClientTimeout(total=None, sock_read=30), aiohttp.TCPConnector(limit=0)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout, connector=no_limit))
        processes = stack.enter_context(ExitStack())
        server = stack.enter_context(running(tmp_path / "server", "appendonly yes"))
        (port,) = unused_ports(1)
        way = await stack.enter_async_context(proxy(port, server.port))
        urls = dict.fromkeys("abc", server.url) | {"c": f"valkey://127.0.0.1:{port}"}
        replicas = {
            name: _replica(tmp_path / name, name, url, fleet, processes) for name, url in urls.items()
        }
        for each in replicas.values():
            each.start()
        clients = []
        for nearest in NEAREST:
            where, envoy = _envoy(tmp_path, nearest, replicas, processes)
            clients.append(Client(session, where, fleet))
            await ready(clients[-1], envoy)
        found = Site(session, fleet, server, way, replicas, clients)
        for each in replicas.values():
            await until(lambda each=each: each.is_ready(session))
        for client in clients:
            await client.until_split()
        yield found
        for each in replicas.values():
            assert "Traceback" not in each.process.output


def _replica(directory: Path, name: str, url: str, fleet: Fleet, processes: ExitStack) -> Replica:
    directory.mkdir()
    config = {
        "strategy": "least_load",
        "decode_first_byte_timeout": 5.0,
        "replicas": {"url": url, "name": name},
        **fleet.config(),
    }
    return Replica(name, Stack(directory), config, processes)


def _envoy(
    directory: Path, nearest: tuple[str, ...], replicas: dict[str, Replica], processes: ExitStack
) -> tuple[Stack, Process]:
    """Start an Envoy; return where it is, with the admin interface of the first of its nearest schedulers."""
    schedulers = [
        SchedulerAddress(f"127.0.0.1:{each.stack.ports.grpc}", name, int(name not in nearest))
        for name, each in replicas.items()
    ]
    ports = EnvoyPorts(*unused_ports(4), "127.0.0.1")
    path = directory / f"envoy-{nearest[0]}.yaml"
    path.write_text(yaml.safe_dump(render_config(ports, schedulers=schedulers)))
    options = ["--log-level", "warning", "--disable-hot-restart", "--concurrency", "1"]
    envoy = processes.enter_context(spawned([find_envoy(), "-c", str(path), *options]))
    return Stack(directory, ports, replicas[nearest[0]].stack.admin_port), envoy


# -- faults: each is there while its block runs; what they yield is the replica that is away


Fault = Callable[[Site, random.Random], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def server_killed(site: Site, _: random.Random) -> AsyncIterator[str]:
    site.server.kill()
    yield ""
    await asyncio.to_thread(site.server.start)


@asynccontextmanager
async def server_stands_still(site: Site, _: random.Random) -> AsyncIterator[str]:
    site.server.signal(signal.SIGSTOP)
    yield ""
    await asyncio.sleep(LASTS_S)
    site.server.signal(signal.SIGCONT)


@asynccontextmanager
async def partition(site: Site, _: random.Random) -> AsyncIterator[str]:
    site.way.freeze()
    yield ""
    await asyncio.sleep(LASTS_S)
    site.way.thaw()


@asynccontextmanager
async def scheduler_killed(site: Site, chance: random.Random) -> AsyncIterator[str]:
    replica = site.replicas[chance.choice("abc")]
    replica.process.signal(signal.SIGKILL)
    replica.process.wait()
    yield replica.name
    replica.start()
    await until(lambda: replica.is_ready(site.session))


@asynccontextmanager
async def scheduler_stands_still(site: Site, chance: random.Random) -> AsyncIterator[str]:
    replica = site.replicas[chance.choice("abc")]
    replica.process.signal(signal.SIGSTOP)
    yield replica.name
    await asyncio.sleep(LASTS_S)
    replica.process.signal(signal.SIGCONT)
    await until(lambda: replica.is_ready(site.session))


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
    body = {"prompt": "p", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    answers = []
    for client in site.clients:
        for _ in range(HELD):
            response = await site.session.post(client.stack.url + "/v1/completions", json=body)
            await response.content.readline()
            assert response.headers["x-pd-prefill"]
            request = response.headers["x-request-id"]
            (owner,) = [
                name for name, each in site.replicas.items() if await each.chose(site.session, request)
            ]
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


async def _through(site: Site, fault: Fault, chance: random.Random) -> str:
    """Let one fault come and go; return what was measured."""
    async with held(site) as answers:
        await site.agree(_counted(answers))
        async with AsyncExitStack() as stack:
            async with loads(site) as seen:
                await asyncio.gather(*(each.more() for each in seen))
                lost = await stack.enter_async_context(fault(site, chance))
                began = time.monotonic()
                await asyncio.gather(*(each.more(60) for each in seen))
            for each in seen:
                each.assert_clean()
            # What a scheduler has in flight when it dies, or Envoy leaves it, nobody counts from then on.
            expected, measured = _counted(answers, lost), ""
            if lost:
                await site.agree(expected, without=lost)
                measured = f"; forgotten {time.monotonic() - began:.2f} s after it was last heard"
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


async def test_faults_harm_no_request(site: Site) -> None:
    chance = random.Random(20261128)
    end = time.monotonic() + SECONDS
    while True:
        for fault in FAULTS:
            print(await _through(site, fault, chance))
        if time.monotonic() >= end:
            break
    for replica in site.replicas.values():
        assert await replica.is_ready(site.session)
