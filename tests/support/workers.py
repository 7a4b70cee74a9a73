"""Fixtures and questions for tests of several workers with a real Envoy."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.sim.profile import EngineProfile

WORKERS = ("w0", "w1")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as found:
        yield found


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """With room for the gRPC ports of three workers."""
    grpc = unused_ports(1)[0]
    while unused_ports(2) != [grpc + 1, grpc + 2]:
        grpc = unused_ports(1)[0]
    return Stack(tmp_path, EnvoyPorts(*unused_ports(3), grpc, "127.0.0.1"))


@pytest.fixture
def settings(fleet: Fleet, tmp_path: Path) -> dict[str, Any]:
    state_file = str(tmp_path / "state.json")
    return {"strategy": "round_robin", **NO_EJECTION, "state_file": state_file, **fleet.config()}


@pytest.fixture
def up(stack: Stack, settings: dict[str, Any]) -> Iterator[Process]:
    with spawned([*stack.up(settings), "--workers=2"]) as process:
        yield process


@pytest_asyncio.fixture
async def client(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, up: Process
) -> AsyncIterator[Client]:
    client = Client(session, stack, fleet)
    await ready(client, up)
    await split_by_all(client)
    yield client
    assert "Traceback" not in up.output
    assert "lua" not in up.output, "a filter's script failed"


def pids(process: Process) -> dict[str, int]:
    """The process ids of the workers that run, by name."""
    found = {}
    for pid in process.children():
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"--worker" in arguments:
                found[f"w{arguments[arguments.index(b'--worker') + 1].decode()}"] = pid
    return found


async def counts(client: Client) -> dict[str, float]:
    """The counters on the metrics page, by name and labels."""
    status, page = await client.admin("GET", "/metrics")
    assert status == 200
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(page)
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def requests(found: dict[str, float]) -> float:
    return sum(value for name, value in found.items() if name.startswith("pd_scheduler_requests_total"))


async def deciders(client: Client, limit: int) -> Counter[str]:
    """How many of the last decisions each worker has made."""
    _, found = await client.admin("GET", f"/decisions?limit={limit}")
    return Counter(each["id"].partition(".")[0] for each in found["decisions"])


async def reachable(client: Client) -> None:
    """Wait until the admin interface answers."""

    async def answers() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            return (await client.admin("GET", "/healthz"))[0] == 200
        return False

    await until(answers)


async def started_again(process: Process, worker: str, before: int) -> None:
    """Wait until another process serves in a worker's place."""

    def serves() -> bool:
        served = process.output.count(f"worker {worker}: serving")
        return served >= 2 and pids(process).get(worker, before) != before

    await until(serves)


async def split_by_all(client: Client, workers: int = 2) -> None:
    """Wait until Envoy asks all workers: each of some requests in a row has a P."""

    async def asked() -> bool:
        answers = [await client.complete() for _ in range(6)]
        split = all("x-pd-prefill" in each.headers for each in answers)
        return split and len(await deciders(client, 6)) == workers

    await until(asked)


async def all_use(client: Client, strategy: str) -> None:
    """Wait until both workers have chosen by a strategy."""

    async def both() -> bool:
        for _ in range(4):
            await client.complete()
        _, found = await client.admin("GET", "/decisions?limit=4")
        used = {(each["id"].partition(".")[0], each["decode"]["strategy"]) for each in found["decisions"]}
        return used == {(worker, strategy) for worker in WORKERS}

    await until(both)


async def chosen_by(client: Client) -> tuple[str, Any]:
    """Which worker has made the last decision, and what it has chosen for prefill."""
    _, found = await client.admin("GET", "/decisions?limit=1")
    (decision,) = found["decisions"]
    return decision["id"].partition(".")[0], decision["prefill"]
