"""Two schedulers of one fleet, each with its Envoy, that meet at a real server: what they tell each other.

Faults under load are in ``tests/chaos/test_replicas.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Client
from tests.support.replicated import Site, replicated
from tests.support.sim_fleet import Fleet
from tests.support.valkey import Server, needs_server, running
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

pytestmark = needs_server

SLOW = replace(EngineProfile.instant(), decode_base=0.1)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=SLOW, arguments=["--max-model-len=4096"]) as started:
        yield started


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "server") as started:
        yield started


@pytest_asyncio.fixture
async def site(fleet: Fleet, server: Server, tmp_path: Path) -> AsyncIterator[Site]:
    settings = {"strategy": "least_load", **NO_EJECTION}
    urls = dict.fromkeys("ab", server.url)
    async with replicated(fleet, tmp_path, server, urls, (("a",), ("b",)), **settings) as found:
        yield found


async def _stream(client: Client) -> aiohttp.ClientResponse:
    """Begin an answer of some seconds."""
    body = {"prompt": "Go on.", "max_tokens": 600, "stream": True}
    answer = await client.session.post(f"{client.stack.url}/v1/completions", json=body)
    assert answer.status == 200
    return answer


async def test_each_sees_the_others_requests_and_spreads_its_own_round_them(site: Site) -> None:
    one, two = site.clients
    await asyncio.gather(one.until_in_flight(0), two.until_in_flight(0))
    async with asyncio.TaskGroup() as group:
        begun = [group.create_task(_stream(one)) for _ in range(3)]
    answers = [each.result() for each in begun]
    await asyncio.gather(one.until_in_flight(3), two.until_in_flight(3))

    async def spread(*counts: int) -> None:
        """Wait until both see so many at each D: a scrape may be older than the last one."""

        async def seen() -> bool:
            names = ("decode-0", "decode-1")
            found = [sorted([(await each.instance(n))["in_flight"] for n in names]) for each in (one, two)]
            return found == [list(counts)] * 2

        await until(seen)

    await spread(1, 2)
    answers.append(await _stream(two))
    await spread(2, 2)
    for answer in answers:
        answer.close()
    await asyncio.gather(one.until_in_flight(0), two.until_in_flight(0))


async def test_a_change_is_made_by_both_and_kept_over_restarts(site: Site) -> None:
    server = site.server
    one, two = site.clients
    status, _ = await one.admin("PUT", "/strategy", {"strategy": "round_robin"})
    assert status == 200
    status, _ = await two.admin("POST", "/instances/decode-0/drain")
    assert status == 202

    async def same() -> bool:
        strategy = (await two.admin("GET", "/strategy"))[1]
        draining = (await one.instance("decode-0"))["state"]
        return "round_robin" in str(strategy) and draining == "draining"

    await until(same)
    # The server loses all, and what it had is put back.
    server.kill()
    await site.until_alone("a", "b")
    status, answer = await one.admin("POST", "/instances/decode-0/undrain")
    assert status == 503
    assert "the log of the replicas does not take the change: 127.0.0.1:" in answer["error"]
    assert (await one.complete()).status == (await two.complete()).status == 200
    await asyncio.to_thread(server.start)
    await site.until_each(1)
    await until(lambda: '"drained":["decode-0"]' in server.ask("XREVRANGE", "{vllm-pd}:changes", "+", "-"))
    status, _ = await one.admin("POST", "/instances/decode-0/undrain")
    assert status == 200

    async def back() -> bool:
        return bool((await two.instance("decode-0"))["state"] != "draining")

    await until(back)


async def test_the_metrics_say_how_it_is(site: Site) -> None:
    one, two = site.clients
    assert (await two.complete()).status == 200

    async def values() -> dict[str, float]:
        _, text = await one.admin("GET", "/metrics")
        lines = (
            line.rpartition(" ") for line in text.splitlines() if line.startswith("pd_scheduler_replica")
        )
        return {name: float(value) for name, _, value in lines}

    found: dict[str, float] = {}

    async def heard() -> bool:
        found.update(await values())
        received = found.get('pd_scheduler_replica_messages_total{direction="received"}', 0)
        return received > 2 and found["pd_scheduler_replicas_silent_seconds"] < 3

    await until(heard)
    assert found["pd_scheduler_replicas_connected"] == found["pd_scheduler_replicas"] == 1
    assert found["pd_scheduler_replicas_differing"] == 0
    assert found['pd_scheduler_replica_message_bytes_total{direction="sent"}'] > 0
    ignored = {name: value for name, value in found.items() if "ignored" in name}
    assert ignored
    assert not any(ignored.values())
