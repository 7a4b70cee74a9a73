"""An event loop that stands still: requests go on without the scheduler, those in flight and new ones."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.waiting import until
from vllm_pd_scheduler.sim.fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile

STRATEGY = """\
import os
import time

from vllm_pd_scheduler.strategies import Strategy


class Sleeps(Strategy):
    def score(self, endpoint, request):
        while os.path.exists(os.environ["SLEEP_WHILE"]):
            time.sleep(0.02)
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
    (tmp_path / "sleepy.py").write_text(STRATEGY)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    config = {**fleet.config(), "strategy": "sleepy:Sleeps"}
    start = stack.up(config) if command == "up" else stack.serve(config)
    with spawned(start, PYTHONPATH=path, SLEEP_WHILE=str(asleep)) as process:
        client = Client(session, stack, fleet)
        if command == "up":
            await check(client, process, asleep)
        else:
            with spawned(stack.envoy()) as envoy:
                await ready(client, envoy)
                await check(client, process, asleep)


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

    async def split_again() -> bool:
        return "x-pd-prefill" in (await client.complete()).headers

    async def said() -> bool:
        return "the event loop runs again, after " in process.output

    await until(split_again)
    await client.until_in_flight(0)
    await until(said)
    assert "the event loop stands still for 2 s, in score (" in process.output
    _, page = await client.admin("GET", "/metrics")
    assert "pd_event_loop_stalls_total 1.0" in page
    assert "Traceback" not in process.output
