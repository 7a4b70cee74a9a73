"""An event loop that stands still: requests go on without the scheduler, those in flight and new ones."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

STRATEGIES = """\
import os
import time

from vllm_pd_scheduler.admin import changes
from vllm_pd_scheduler.strategies import Strategy


def sleep(*_):
    while os.path.exists(os.environ["SLEEP_WHILE"]):
        time.sleep(0.02)


class Sleeps(Strategy):
    def score(self, endpoint, request):
        sleep()
        return endpoint.in_flight


class DiskHangs(Strategy):
    def __init__(self, config):
        super().__init__(config)
        os.fsync = sleep
        changes.KEEP_S = 2.0

    def score(self, endpoint, request):
        return endpoint.in_flight
"""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 2, profile=EngineProfile.instant()) as running:
        yield running


@pytest.mark.parametrize("command", ["up", "serve"])
async def test_all_requests_are_answered(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path, command: str
) -> None:
    stack, asleep = Stack(tmp_path), tmp_path / "asleep"
    config = {**fleet.config(), "strategy": "sleepy:Sleeps"}
    start = stack.up(config) if command == "up" else stack.serve(config)
    with spawned(start, **environment(tmp_path)) as process:
        client = Client(session, stack, fleet)
        if command == "up":
            await check(client, process, asleep)
        else:
            with spawned(stack.envoy()) as envoy:
                await ready(client, envoy)
                await check(client, process, asleep)


async def test_a_disk_that_hangs(session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path) -> None:
    """A change of the admin's waits for it, no request does, and it keeps nobody from ending."""
    stack, asleep = Stack(tmp_path), tmp_path / "asleep"
    config = {**fleet.config(), "strategy": "sleepy:DiskHangs", "state_file": str(tmp_path / "state.json")}
    with spawned(stack.up(config), **environment(tmp_path)) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        await asyncio.to_thread(asleep.touch)
        drain = asyncio.ensure_future(client.admin("POST", "/instances/decode-1/drain"))
        until_refused = 0
        while not drain.done():
            assert "x-pd-prefill" in (await client.complete()).headers
            until_refused += 1
            await asyncio.sleep(0.1)
        status, answer = await drain
        assert (status, "the disk has not answered" in answer["error"]) == (507, True)
        assert until_refused > 1
        assert (await client.states())["decode-1"] == "healthy"
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
        assert "stands still" not in process.output


def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sleepy.py").write_text(STRATEGIES)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "SLEEP_WHILE": str(tmp_path / "asleep")}


async def check(client: Client, process: Process, asleep: Path) -> None:
    await ready(client, process)
    expected = (await client.complete()).text
    await asyncio.to_thread(asleep.touch)
    in_flight = [asyncio.ensure_future(client.complete()) for _ in range(12)]
    for answer in await asyncio.gather(*in_flight):
        assert answer.text == expected
        assert "x-pd-prefill" not in answer.headers

    stats = await client.json(client.stack.envoy_admin + "/stats?format=json&filter=failure_mode_allowed")
    (counter,) = stats["stats"]
    assert counter["name"] == "http.ingress.ext_proc.failure_mode_allowed", "docs/metrics.md names it"
    assert counter["value"] >= 12

    for _ in range(3):  # and it stays so
        answers = await asyncio.gather(*(client.complete(stream=True) for _ in range(5)))
        assert {answer.text for answer in answers} == {expected}
        await asyncio.sleep(0.5)
    await asyncio.to_thread(asleep.unlink)

    async def said() -> bool:
        return "the event loop runs again, after " in process.output

    await client.until_split()
    await client.until_in_flight(0)
    await until(said)
    assert "the event loop stands still for 2 s, in sleep (" in process.output
    _, page = await client.admin("GET", "/metrics")
    assert "pd_scheduler_event_loop_stalls_total 1.0" in page
    assert "Traceback" not in process.output
