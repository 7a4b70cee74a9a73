"""P pulls what another instance has cached of a prompt, through real processes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    profile = EngineProfile(prefill_rate=5_000.0, lease=60.0)
    arguments = ["--load-fail-delay=0.5"]
    with Fleet(2, 1, profile=profile, arguments=arguments, connector="offloading-p2p") as running:
        yield running


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack) -> Iterator[Process]:
    unprobed = {"health_check_interval": 3600.0}  # but at the start: requests alone find what has died
    with spawned(
        stack.up({"strategy": "round_robin", **unprobed, **NO_EJECTION, **fleet.config()})
    ) as process:
        yield process


@pytest_asyncio.fixture
async def client(client: Client) -> AsyncIterator[Client]:
    await client.until_split()
    yield client


async def told(client: Client, prompt: str) -> tuple[str, str, Any]:
    """Return the P of a request, the text of the answer, and the source that P was told."""
    before = await client.seen_by_all()
    answer = await client.complete(prompt=prompt, max_tokens=8)
    assert answer.status == 200
    prefill = answer.headers["x-pd-prefill"]
    (seen,) = [
        each
        for each in await client.seen_since(prefill, before[prefill])
        if each["path"] == "/v1/completions"
    ]
    return prefill, answer.text, json.loads(seen["body"])["kv_transfer_params"].get("remote_kv_source")


async def pulled(client: Client, name: str) -> int:
    stats = await client.json(client.fleet[name].url + "/_sim/stats")
    return int(stats["hand_offs"].get("pulled", 0))


async def test_a_prompt_that_another_has(client: Client) -> None:
    prompt = "what the first P computes, the second one pulls " * 250
    first, text, source = await told(client, prompt)
    assert source is None
    second, again, source = await told(client, prompt)
    assert (first != second, again) == (True, text)
    places = [(each.host, each.port) for each in client.fleet.instances if each.id != second]
    assert (source["remote_host"], source["remote_port"]) in places
    assert await pulled(client, second) == 1
    _, page = await client.admin("GET", "/metrics")
    assert 'pd_scheduler_pulled_prompt_tokens_total{outcome="ok",source=' in page
    _, found = await client.admin("GET", "/decisions?limit=1")
    decision = (found if isinstance(found, dict) else json.loads(found))["decisions"][0]
    assert decision["prefill"]["source"]["tokens"] > 2000


async def test_a_source_that_has_died(client: Client) -> None:
    """P computes the prompt when it has waited long enough; the text is right."""
    prompt = "a source can die, and P gives it up at last, and computes " * 250
    first, text, _ = await told(client, prompt)
    client.fleet.kill(first)
    second, again, source = await told(client, prompt)
    assert (second != first, again) == (True, text)
    assert source["remote_port"] == client.fleet[first].port, "no probe has seen yet that it is gone"
    _, page = await client.admin("GET", "/metrics")
    assert f'pd_scheduler_pulled_prompt_tokens_total{{outcome="in_vain",source="{first}"}}' in page
