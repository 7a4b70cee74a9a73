"""An Envoy with several schedulers tells the one that has a request what becomes of it, after faults too."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
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
from tests.support.valkey import needs_server, running
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.envoy.schedulers import SchedulerAddress

SETTINGS: dict[str, Any] = {
    "strategy": "round_robin",
    "ejection_success_rate": 0.0,
    "ejection_failures": 1000,
}
LONG = "Where does the cache go? " * 40


@dataclass
class Scheduler:
    """One of the two."""

    client: Client
    """A client of Envoy, and of this one's admin interface."""
    process: Process

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
    with Fleet(2, 2, arguments=["--max-model-len=4096", "--decode-base=0.01", "--lease=5"]) as started:
        yield started


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=HUNG_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as opened:
        yield opened


@pytest_asyncio.fixture
async def schedulers(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[Scheduler, Scheduler]]:
    """The nearest one and another one, behind one Envoy; with a parameter, which share."""
    first = Stack(tmp_path)
    (tmp_path / "second").mkdir()
    second = Stack(tmp_path / "second", replace(first.ports, grpc=unused_ports(1)[0]), unused_ports(1)[0])
    addresses = [
        SchedulerAddress(f"127.0.0.1:{first.ports.grpc}"),
        SchedulerAddress(f"localhost:{second.ports.grpc}", priority=1),  # as by a Service of Kubernetes
    ]
    config = render_config(first.ports, schedulers=addresses)
    path = tmp_path / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    options = ["--log-level", "warning", "--disable-hot-restart", "--concurrency", "1"]
    with ExitStack() as stack:
        settings = {**SETTINGS, **fleet.config()}
        if getattr(request, "param", False):
            server = stack.enter_context(running(tmp_path / "server"))
            settings["replicas"] = {"url": server.url}
        both = tuple(
            Scheduler(
                Client(session, each, fleet),
                stack.enter_context(spawned(each.serve(settings))),
            )
            for each in (first, second)
        )
        envoy = stack.enter_context(spawned([find_envoy(), "-c", str(path), *options]))
        await ready(both[0].client, envoy)
        for each in both:
            await until(each.ready)
        await until(lambda: both[0].client.healthy_schedulers(2))
        await both[0].client.until_split()
        yield both[0], both[1]
        await both[0].client.undo_faults()


async def _failures(scheduler: Scheduler) -> float:
    series = 'pd_scheduler_decode_attempt_failures_total{decode="decode-0",failure="status"}'
    return await scheduler.metric(series)


async def until_told(scheduler: Scheduler, instead: Scheduler) -> None:
    """Wait until all threads of Envoy have opened their logs at a scheduler, no more at the other one."""
    strays, results = "pd_scheduler_strays_total{", "pd_scheduler_responses_total{"

    async def settled() -> bool:
        astray, told = await instead.metric(strays), await scheduler.metric(results)
        async with load(scheduler.client) as seen:
            await seen.more(64)

        async def all_told() -> bool:
            astray_now = await instead.metric(strays) - astray
            return await scheduler.metric(results) - told + astray_now >= 64

        with suppress(TimeoutError):  # a result that is on its way when its stream ends is lost
            await until(all_told, 5)
        return await instead.metric(strays) == astray and await scheduler.metric(results) - told >= 64

    await until(settled)


async def _pinned(client: Client, blocks: int) -> bool:
    stats = [await client.json(each.url + "/_sim/stats") for each in client.fleet.prefill]
    return sum(each["pinned"] for each in stats) == blocks


async def assert_told(scheduler: Scheduler) -> None:
    """The next failures of an instance are told to a scheduler, which frees their hand-offs."""
    client = scheduler.client
    await client.fault("decode-0", status=500)
    before = await _failures(scheduler)

    async def heard() -> bool:
        await client.complete()
        return await _failures(scheduler) > before

    await until(heard)  # what is told when the log of failures is at another one is lost
    await client.fault("decode-0")
    await until(lambda: _pinned(client, 0))  # by the end of a lease if that was so
    await client.fault("decode-0", status=500)
    before = await _failures(scheduler)
    freed = await scheduler.metric("pd_scheduler_handoffs_unused_total{")
    answers = [await client.complete(prompt=LONG) for _ in range(8)]
    assert {each.status for each in answers} == {200}
    rescued = sum("x-pd-prefill" not in each.headers for each in answers)
    assert rescued, "round robin"

    async def counted() -> bool:
        return await _failures(scheduler) == before + rescued

    async def all_freed() -> bool:
        return await scheduler.metric("pd_scheduler_handoffs_unused_total{") == freed + rescued

    await until(counted)
    await client.until_freed()
    await until(all_freed)  # P has freed it before the scheduler hears that it has
    await client.fault("decode-0")


async def _asked(scheduler: Scheduler) -> bool:
    return await scheduler.chose((await scheduler.client.complete()).headers)


async def test_the_logs_follow_the_requests_after_a_kill(schedulers: tuple[Scheduler, Scheduler]) -> None:
    nearest, other = schedulers
    await until_told(nearest, other)
    await assert_told(nearest)
    async with load(nearest.client) as seen:
        nearest.process.signal(signal.SIGKILL)
        nearest.process.wait()
        await until(lambda: _asked(other))
    seen.assert_clean()
    await assert_told(other)
    with spawned(nearest.client.stack.serve({**SETTINGS, **nearest.client.fleet.config()})):
        async with load(nearest.client) as seen:
            await until(nearest.ready)
            await until(lambda: _asked(nearest))
        seen.assert_clean()
        await until_told(nearest, other)
        await assert_told(nearest)


async def test_the_logs_follow_the_requests_after_a_hang(schedulers: tuple[Scheduler, Scheduler]) -> None:
    """The scheduler that comes back is the same run as before."""
    nearest, other = schedulers
    await until_told(nearest, other)
    nearest.process.signal(signal.SIGSTOP)
    try:
        async with load(other.client) as seen:
            await until(lambda: _asked(other))
        await assert_told(other)
    finally:
        nearest.process.signal(signal.SIGCONT)
    async with load(nearest.client) as more:
        await until(lambda: _asked(nearest))
    seen.assert_clean()
    more.assert_clean()
    await until_told(nearest, other)
    await assert_told(nearest)


@needs_server
@pytest.mark.parametrize("schedulers", [True], indirect=True)
async def test_what_is_told_to_another_one_reaches_the_one_that_has_the_request(
    schedulers: tuple[Scheduler, Scheduler],
) -> None:
    """As after a failover: Envoy's logs stay at the other one, and it asks the nearest again."""
    nearest, other = schedulers
    client = nearest.client
    nearest.process.signal(signal.SIGSTOP)
    try:
        async with load(other.client) as seen:
            await until(lambda: _asked(other))
        await other_is_told(other)
    finally:
        nearest.process.signal(signal.SIGCONT)
    seen.assert_clean()
    await until(lambda: _asked(nearest))
    freed = await nearest.metric("pd_scheduler_handoffs_unused_total{")
    await client.fault("decode-0", status=500)
    answers = [await client.complete(prompt=LONG) for _ in range(4)]
    await client.fault("decode-0")
    rescued = sum("x-pd-prefill" not in each.headers for each in answers)
    assert {each.status for each in answers} == {200}
    assert rescued, "round robin"

    async def counted() -> bool:
        return await nearest.metric("pd_scheduler_handoffs_unused_total{") == freed + rescued

    await until(counted)
    await client.until_freed()


async def other_is_told(other: Scheduler) -> None:
    """Wait until a failure of an instance is told to the other one."""
    await other.client.fault("decode-0", status=500)
    before = await _failures(other)

    async def heard() -> bool:
        await other.client.complete()
        return await _failures(other) > before

    await until(heard)
    await other.client.fault("decode-0")


async def test_a_request_of_a_scheduler_that_died_has_one_more_attempt(
    schedulers: tuple[Scheduler, Scheduler],
) -> None:
    """The other scheduler, which is asked, does not know it."""
    nearest, _ = schedulers
    client = nearest.client
    with client.frozen("decode-0", "decode-1"):
        waiting = [asyncio.ensure_future(client.complete()) for _ in range(2)]

        async def at_decode() -> bool:
            """Not at P any more: what has no D yet when its scheduler dies is sent to one once."""
            at = "/stats?format=json&filter=^cluster.decode.upstream_rq_active$"
            (active,) = (await client.json(client.stack.envoy_admin + at))["stats"]
            return bool(active["value"] == 2)

        await until(at_decode)
        nearest.process.signal(signal.SIGKILL)
        nearest.process.wait()

        await until(lambda: client.healthy_schedulers(1))
        client.fleet.kill("decode-0")
    assert [(await each).status for each in waiting] == [200, 200]
    client.fleet.restart("decode-0")
