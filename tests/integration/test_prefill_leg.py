"""The two ways of a prefill, on real processes: straight to P, and through Envoy's prefill listener."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

KEY = "s3cret-key"
SETTINGS = {
    "strategy": "round_robin",
    "api_key": {"env": "FLEET_KEY"},
    **NO_EJECTION,
}
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 1, profile=EngineProfile.instant(), arguments=[f"--api-key={KEY}"]) as running:
        yield running


@pytest.fixture(params=["straight", "listener"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def started(stack: Stack, fleet: Fleet, way: str, **more: Any) -> Iterator[Process]:
    config = {**SETTINGS, **fleet.config(), **(stack.listener if way == "listener" else {}), **more}
    with spawned(stack.up(config), FLEET_KEY=KEY) as process:
        yield process


@pytest.fixture
def up(tmp_path: Path, fleet: Fleet, way: str) -> Iterator[tuple[Stack, Process]]:
    stack = Stack(tmp_path)
    with started(stack, fleet, way) as process:
        yield stack, process


@pytest.fixture
async def client(
    session: aiohttp.ClientSession, up: tuple[Stack, Process], fleet: Fleet
) -> AsyncIterator[Client]:
    made = Client(session, up[0], fleet)
    await ready(made, up[1])
    yield made
    for instance in fleet.instances:
        await (made.fault(instance.id) if instance.alive else asyncio.to_thread(fleet.restart, instance.id))
    assert "Traceback" not in up[1].output


async def failures(client: Client) -> dict[str, float]:
    """Prefills that failed, by reason."""
    _, page = await client.admin("GET", "/metrics")
    lines = [line for line in page.splitlines() if line.startswith("pd_scheduler_prefill_failures_total{")]
    return {line.split('reason="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


async def test_it_takes_that_way(client: Client, way: str) -> None:
    answers = [await client.complete() for _ in range(4)]
    assert {answer.headers["x-pd-prefill"] for answer in answers} == {"prefill-0", "prefill-1"}
    assert len({answer.text for answer in answers}) == 1
    request = (await client.seen(answers[-1].headers["x-pd-prefill"]))[-1]
    seen = {name.lower(): value for name, value in request["headers"].items()}
    assert seen["authorization"] == f"Bearer {KEY}"
    assert seen["x-request-id"] == answers[-1].headers["x-request-id"]
    found = await client.json(client.stack.envoy_admin + "/stats?format=json&filter=^cluster.prefill.")
    counts = {each["name"]: each["value"] for each in found["stats"] if "value" in each}
    assert counts["cluster.prefill.upstream_rq_total"] == (0 if way == "straight" else 4)
    with socket.socket() as probe:
        listens = probe.connect_ex(("127.0.0.1", client.stack.ports.prefill)) == 0
    assert listens is (way == "listener"), "a listener that nobody needs is not there"


async def test_a_p_that_is_gone_is_passed_over(client: Client, fleet: Fleet) -> None:
    await client.complete()
    fleet.kill("prefill-0")
    answers = [await client.complete() for _ in range(8)]
    assert {(answer.status, answer.headers["x-pd-prefill"]) for answer in answers} == {(200, "prefill-1")}
    assert set(await failures(client)) <= {"connect", "reset"}


async def test_a_p_that_resets_each_request_is_asked_once(client: Client) -> None:
    await client.complete()
    await client.fault("prefill-0", reset=True)
    before = await client.seen_by_all()
    answers = [await client.complete(prompt=f"Prompt {number}") for number in range(4)]
    assert {(answer.status, answer.headers["x-pd-prefill"]) for answer in answers} == {(200, "prefill-1")}
    asked = await client.seen_since("prefill-0", before["prefill-0"])
    assert await failures(client) == {"reset": len(asked)}


async def test_a_p_that_hangs_has_its_time(
    session: aiohttp.ClientSession, tmp_path: Path, fleet: Fleet, way: str
) -> None:
    stack = Stack(tmp_path)
    with started(stack, fleet, way, prefill_timeout=3.0) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        await client.complete()
        with client.frozen("prefill-0"):
            answers = await asyncio.gather(*(client.complete() for _ in range(4)))
        assert {(answer.status, answer.headers["x-pd-prefill"]) for answer in answers} == {(200, "prefill-1")}
        assert set(await failures(client)) == {"timeout"}


NONSENSE = {
    "no HTTP": (b"\x16\x03\x01\x02\x00" * 1000, b"", {"reset"}),
    "headers without end": (b"HTTP/1.1 200 OK\r\n", b"x-more: and more\r\n" * 1000, {"reset"}),
    "two lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}x", b"", {"reset"}),
    "a body without end": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, {"unreadable"}),
    "compressed": (
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx",
        b"",
        {"unreadable"},
    ),
    "half an answer": (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx", b"", {"reset"}),
    "nothing": (b"", b"", {"reset"}),
}
"""What P answers a prefill with, what it goes on with for ever, and how it is counted."""


@contextlib.asynccontextmanager
async def talker(begin: bytes, more: bytes) -> AsyncIterator[int]:
    """A server that is healthy, and answers all POSTs the same; yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while not (head := await reader.readuntil(b"\r\n\r\n")).startswith(b"POST"):
                writer.write(OK if head.startswith(b"GET /health") else OK.replace(b"200 OK", b"404 No"))
            writer.write(begin)
            while more:
                writer.write(more)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(("begin", "more", "reasons"), NONSENSE.values(), ids=NONSENSE)
async def test_a_p_that_answers_nonsense_is_passed_over(
    session: aiohttp.ClientSession,
    tmp_path: Path,
    fleet: Fleet,
    way: str,
    begin: bytes,
    more: bytes,
    reasons: set[str],
) -> None:
    stack = Stack(tmp_path)
    async with talker(begin, more) as port:
        prefill = [*fleet.config()["prefill_instances"], {"id": "talker", "host": "127.0.0.1", "port": port}]
        with started(stack, fleet, way, prefill_instances=prefill) as process:
            client = Client(session, stack, fleet)
            await ready(client, process)

            async def asked() -> bool:
                assert (await client.complete()).status == 200
                return bool(await failures(client))

            await until(asked)
            if way == "straight":  # Envoy passes a broken answer on as it breaks
                assert set(await failures(client)) == reasons
            assert "Traceback" not in process.output
