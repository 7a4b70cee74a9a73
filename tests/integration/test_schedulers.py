"""An Envoy with several schedulers: what it tells of a request comes to the one that has it, also after a fault."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml

from tests.support.load import load
from tests.support.processes import Client, Process, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.envoy.schedulers import SchedulerAddress

SETTINGS: dict[str, Any] = {"strategy": "round_robin", "ejection_success_rate": 0.0, "ejection_failures": 1000}
LONG = "Where does the cache go? " * 40


@dataclass
class Scheduler:
    """One of the two."""

    client: Client
    """A client of Envoy, and of this one's admin interface."""
    fleet: Fleet
    process: Process | None = None

    async def metric(self, start: str) -> float:
        """Return the sum of the series that begin so."""
        _, page = await self.client.admin("GET", "/metrics")
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(start))

    async def ready(self) -> bool:
        try:
            status, _ = await self.client.admin("GET", "/readyz")
        except aiohttp.ClientError:
            return False
        return bool(status == 200)

    async def chose(self, headers: dict[str, str]) -> bool:
        """Whether it was asked about a request, of which an answer has these headers."""
        _, found = await self.client.admin("GET", f"/decisions?request_id={headers['x-request-id']}")
        return bool(found["decisions"])


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, arguments=["--max-model-len=4096", "--decode-base=0.01"]) as running:
        yield running


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as opened:
        yield opened


@pytest_asyncio.fixture
async def schedulers(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> AsyncIterator[tuple[Scheduler, Scheduler]]:
    """The nearest one and another one, behind one Envoy."""
    first = Stack(tmp_path)
    (tmp_path / "second").mkdir()
    second = Stack(
        tmp_path / "second", replace(first.ports, grpc=unused_ports(1)[0]), unused_ports(1)[0]
    )
    addresses = [
        SchedulerAddress(f"127.0.0.1:{each.ports.grpc}", priority=priority)
        for priority, each in enumerate((first, second))
    ]
    config = render_config(first.ports, schedulers=addresses)
    path = tmp_path / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [find_envoy(), "-c", str(path), "--log-level", "warning", "--disable-hot-restart", "--concurrency", "2"]
    with ExitStack() as stack:
        both = tuple(Scheduler(Client(session, each, fleet), fleet) for each in (first, second))
        for each in both:
            each.process = stack.enter_context(spawned(each.client.stack.serve({**SETTINGS, **fleet.config()})))
        envoy = stack.enter_context(spawned(command))
        await ready(both[0].client, envoy)
        for each in both:
            await until(each.ready)
        await both[0].client.until_split()
        yield both
        for each in both:
            await each.client.undo_faults()


async def _failures(scheduler: Scheduler) -> float:
    return await scheduler.metric('pd_scheduler_decode_attempt_failures_total{decode="decode-0",failure="status"}')


async def _asked(scheduler: Scheduler) -> bool:
    return await scheduler.chose((await scheduler.client.complete()).headers)


async def assert_told(scheduler: Scheduler) -> None:
    """The next failures of an instance are told to a scheduler, which frees their hand-offs."""
    client = scheduler.client
    await client.until_freed()
    await client.fault("decode-0", status=500)
    before = await _failures(scheduler)
    freed = await scheduler.metric("pd_scheduler_handoffs_unused_total{")
    answers = [await client.complete(prompt=LONG) for _ in range(8)]
    assert {each.status for each in answers} == {200}
    rescued = sum("x-pd-prefill" not in each.headers for each in answers)
    assert rescued == 4, "round robin"

    async def counted() -> bool:
        return await _failures(scheduler) == before + rescued

    try:
        await until(counted, 10)
    except TimeoutError:
        print((await client.admin('GET','/metrics'))[1]); raise
    await client.until_freed()
    assert await scheduler.metric("pd_scheduler_handoffs_unused_total{") == freed + rescued
    await client.fault("decode-0")


async def test_the_logs_follow_the_requests(schedulers: tuple[Scheduler, Scheduler]) -> None:
    nearest, other = schedulers
    await assert_told(nearest)
    assert nearest.process is not None
    async with load(nearest.client) as seen:
        nearest.process.signal(signal.SIGKILL)
        nearest.process.wait()
        await until(lambda: _asked(other))
        await seen.more()
    seen.assert_clean()
    await assert_told(other)
    with spawned(nearest.client.stack.serve({**SETTINGS, **nearest.fleet.config()})):
        await until(nearest.ready)
        async with load(nearest.client) as seen:
            await until(lambda: _asked(nearest))
            # Envoy's threads each have their own streams.
            async def quiet() -> bool:
                before = await other.metric("pd_scheduler_strays_total{")
                results = await nearest.metric("pd_scheduler_responses_total{")
                await seen.more(100)
                ...
                return before > 0
            await until(quiet)
        seen.assert_clean()
        await assert_told(nearest)
