"""SGLang between simulated engines: two legs that meet in a room, and what one does without the other."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support.sim import BODY, COMPLETIONS, Client
from tests.support.sim_fleet import Fleet, SimInstance
from vllm_pd_scheduler.health.vllm_metrics import parse_metrics
from vllm_pd_scheduler.sim.profile import EngineProfile

ROOMS = itertools.count(1)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Engines that wait for each other longer than any test does."""
    with started(300.0) as running:
        yield running


@pytest.fixture(scope="module")
def brief() -> Iterator[Fleet]:
    """Engines that wait half a second."""
    with started(0.5) as running:
        yield running


def started(lease: float) -> Fleet:
    profile = replace(EngineProfile.instant(), lease=lease)
    return Fleet(1, 1, profile=profile, arguments=["--load-fail-delay=0"], connector="sglang")


@pytest.fixture
def body(fleet: Fleet) -> dict[str, Any]:
    room = next(ROOMS)
    p = fleet["prefill-0"]
    where = {"bootstrap_host": p.host, "bootstrap_port": p.port, "bootstrap_room": room}
    return {**BODY, **where, "rid": f"r-{room}-"}


async def send(client: Client, to: SimInstance, body: dict[str, Any], path: str = COMPLETIONS) -> Any:
    async with client.session.post(to.url + path, json=body) as response:
        return response.status, await response.text()


async def test_both_legs_in_either_order(fleet: Fleet, client: Client, body: dict[str, Any]) -> None:
    p, d = asyncio.ensure_future(send(client, fleet["prefill-0"], body)), None
    d = await send(client, fleet["decode-0"], body)
    assert (d[0], (await p)[0]) == (200, 200)
    body["bootstrap_room"] = next(ROOMS)
    waiting = asyncio.ensure_future(send(client, fleet["decode-0"], body))
    assert (await send(client, fleet["prefill-0"], body))[0] == 200
    assert (await waiting)[0] == 200


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
async def test_without_a_room_nothing_is_served(fleet: Fleet, client: Client, name: str) -> None:
    status, text = await send(client, fleet[name], BODY)
    assert status == 400
    assert "without bootstrap room id" in text


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
async def test_a_leg_alone_ends_after_its_time(
    brief: Fleet, client: Client, body: dict[str, Any], name: str
) -> None:
    status, _ = await send(client, brief[name], body)
    assert status == 500


async def test_an_abort_ends_a_leg_that_waits(fleet: Fleet, client: Client, body: dict[str, Any]) -> None:
    d = fleet["decode-0"]
    stream = asyncio.ensure_future(send(client, d, {**body, "stream": True}))
    while not stream.done():
        assert (await send(client, d, {"rid": body["rid"]}, "/abort_request"))[0] == 200
        await asyncio.sleep(0.01)
    status, text = await stream
    assert status == 200, "the headers of a stream come with its first event, which is an error"
    assert "Aborted" in text


async def test_its_metrics(fleet: Fleet, client: Client) -> None:
    async with client.session.get(fleet["decode-0"].url + "/metrics") as response:
        page = await response.read()
    assert b"vllm:" not in page
    scrape = parse_metrics(page)
    assert scrape.kv_capacity
    assert "vllm:time_to_first_token_seconds" in scrape.histograms
