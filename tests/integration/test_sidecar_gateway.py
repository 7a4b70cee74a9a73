"""llm-d's sidecars behind an Envoy that asks as inference gateways do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.gateway import Gateway, gateway_client, gateway_running
from tests.support.processes import Client
from tests.support.sidecar import PREFILLER, Sidecar, config_with, sidecars
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

KINDS = {
    "override_host": Gateway(),
    "original_dst, self-signed": Gateway(cluster="original_dst", failure_mode_allow=False, tls=True),
    "no response body": Gateway(response_body="NONE"),
}
PROMPT = {"prompt": "Where is the cache?", "max_tokens": 8}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


@dataclass
class Running:
    client: Client
    beside: dict[str, Sidecar]
    kind: str

    @property
    def asked(self) -> list[str | None]:
        return [prefill for sidecar in self.beside.values() for prefill in sidecar.asked]

    async def loads(self) -> dict[str, int]:
        _, found = await self.client.admin("GET", "/instances")
        return {each["id"]: each["in_flight"] for each in found["instances"] if each["in_flight"]}


@pytest.fixture(params=KINDS)
async def running(request: pytest.FixtureRequest, fleet: Fleet, tmp_path: Path) -> AsyncIterator[Running]:
    gateway = KINDS[request.param]
    async with sidecars(fleet) as beside:
        config = {"strategy": "round_robin", **config_with(fleet, beside)}
        if gateway.tls:
            config["grpc_tls"] = {"self_signed": True}
        with gateway_running(tmp_path, gateway, config) as started:
            async with gateway_client(started, fleet) as client:
                yield Running(client, beside, request.param)
                for each in fleet.instances:
                    await client.fault(each.id)
                await client.until_in_flight(0)
                assert "Traceback" not in started.scheduler.output


async def test_p_is_named_and_the_body_is_untouched(running: Running, fleet: Fleet) -> None:
    client = running.client
    for size in (0, 200_000):
        body = json.dumps({**PROMPT, "padding": " x" * size}).encode() + b" \n"
        for _ in range(2):
            answer = await client.post("/v1/completions", body)
            assert answer.status == 200, answer
            prefill = fleet[answer.headers["x-pd-prefill"]].url.removeprefix("http://")
            sidecar = running.beside[answer.headers["x-pd-decode"]]
            assert sidecar.asked[-1] == prefill
            assert sidecar.bodies[-1] == body
    text = (await client.complete(**PROMPT)).text
    assert (await client.complete(**PROMPT, stream=True)).text == text
    assert None not in running.asked
    assert len(set(running.asked)) == 2
    await client.until_freed()


async def test_a_client_steers_no_sidecar(running: Running) -> None:
    headers = {PREFILLER: "127.0.0.1:1", "x-data-parallel-rank": "1"}
    for body in (PROMPT, {**PROMPT, "n": 2}):
        assert (await running.client.post("/v1/completions", body, headers)).status == 200
    assert "127.0.0.1:1" not in running.asked
    assert running.asked.count(None) == 1


async def test_p_counts_until_the_stream_begins(running: Running, fleet: Fleet) -> None:
    """However much longer than predicted that takes, where the gateway tells of it."""
    client = running.client
    for _ in range(4):  # from now on it is known whether this gateway tells
        assert (await client.complete(**PROMPT, stream=True)).status == 200
    await client.until_in_flight(0)
    for each in fleet.prefill:
        await client.fault(each.id, delay=1.5)
    for each in fleet.decode:
        await client.fault(each.id, mute=2)
    loads: list[dict[str, int]] = []

    async def watch() -> None:
        while True:
            loads.append(await running.loads())
            await asyncio.sleep(0.05)

    url, body = client.stack.url + "/v1/completions", {**PROMPT, "stream": True}
    watching = asyncio.ensure_future(watch())
    try:
        async with client.session.post(url, json=body) as answer:
            before = len(loads)
            assert answer.status == 200
            prefill, decode = answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]
            while_prefilling = [found for found in loads[:before] if found]

            async def only_d() -> bool:
                return await running.loads() == {decode: 1}

            await until(only_d)
    finally:
        watching.cancel()
    assert while_prefilling[len(while_prefilling) // 2] == {prefill: 1, decode: 1}


async def test_a_failing_p_is_ejected_and_no_d(running: Running, fleet: Fleet) -> None:
    client = running.client
    await client.fault("prefill-0", status=500)

    async def ejected() -> bool:
        answer = await client.complete(**PROMPT)
        assert answer.status in (200, 500)
        states = await client.states()
        assert all(states[name] == "healthy" for name in running.beside), "no D is at fault"
        return states["prefill-0"] != "healthy"

    await until(ejected)
    await client.fault("prefill-0")

    async def back() -> bool:
        await client.complete(**PROMPT)
        return (await client.states())["prefill-0"] == "healthy"

    await until(back)


async def test_a_client_that_leaves(running: Running, fleet: Fleet) -> None:
    client = running.client
    for each in fleet.prefill:
        await client.fault(each.id, stuck=True)
    url = client.stack.url + "/v1/completions"
    leaving = asyncio.ensure_future(client.session.post(url, json={**PROMPT, "stream": True}))

    async def there() -> bool:
        return bool(await running.loads())

    await until(there)
    leaving.cancel()
    await client.until_in_flight(0)
