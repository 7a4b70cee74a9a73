"""Requests through an Envoy that asks by the endpoint-picker protocol, as inference gateways do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.certificates import make_certificates
from tests.support.gateway import Gateway, Running, gateway_client, gateway_running
from tests.support.processes import NO_EJECTION, Client
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile

KINDS = {
    "override_host": Gateway(),
    "by header": Gateway(source="header"),
    "by metadata": Gateway(source="metadata", failure_mode_allow=False),
    "original_dst": Gateway(cluster="original_dst", failure_mode_allow=False),
    "tls": Gateway(tls=True),
    "no metadata": Gateway(cluster="original_dst", forwards_metadata=False),
    "no response body": Gateway(response_body="NONE"),
}
PROMPT = "Whose is the cache? " * 40


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture(scope="module", params=KINDS)
def running(
    request: pytest.FixtureRequest, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    directory: Path = tmp_path_factory.mktemp("gateway")
    gateway = KINDS[request.param]
    config: dict[str, Any] = {"strategy": "round_robin", **NO_EJECTION, **fleet.config()}
    if gateway.tls:
        config["grpc_tls"] = make_certificates(directory).server
    with gateway_running(directory, gateway, config) as started:
        yield started


@pytest_asyncio.fixture
async def client(running: Running, fleet: Fleet) -> AsyncIterator[Client]:
    async with gateway_client(running, fleet) as client:
        yield client
        for instance in fleet.instances:
            await client.fault(instance.id)
        await client.until_in_flight(0)
        assert "Traceback" not in running.scheduler.output
        assert "does not fit this scheduler" not in running.scheduler.output


async def test_a_request_is_split(client: Client) -> None:
    answer = await client.complete()
    assert answer.status == 200, answer
    seen = await client.request_of(answer)
    assert seen["hand_off"] == "receive"
    assert answer.headers["x-pd-prefill"].startswith("prefill-")
    names = {name.lower() for name in seen["headers"]}
    assert not [name for name in names if name.startswith(("x-pd-", "x-envoy-max"))], names
    await client.until_freed()


async def test_a_stream(client: Client) -> None:
    whole = await client.complete(prompt=PROMPT, max_tokens=30)
    streamed = await client.complete(prompt=PROMPT, max_tokens=30, stream=True)
    assert streamed.text == whole.text
    assert (await client.request_of(streamed))["hand_off"] == "receive"


async def test_a_get(client: Client) -> None:
    answer = await client.send("GET", "/v1/models")
    assert answer.status == 200
    assert answer.json["data"]


@pytest.mark.parametrize("size", [1, 61_000, 62_500, 130_000, 1 << 20, 10 << 20])
async def test_bodies_of_all_sizes(client: Client, size: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "padding": "x" * size}
    answer = await client.post("/v1/completions", body)
    assert answer.status == 200, answer
    seen = await client.request_of(answer)
    assert seen["hand_off"] == "receive"
    assert seen["body_bytes"] > len(json.dumps(body))


async def test_many_at_once(client: Client) -> None:
    answers = await asyncio.gather(
        *(client.complete(max_tokens=n % 7 + 1, stream=n % 2 > 0) for n in range(60))
    )
    assert {answer.status for answer in answers} == {200}


async def test_what_is_refused(client: Client) -> None:
    answer = await client.send("POST", "/v1/completions", b"{")
    assert (answer.status, answer.headers["x-pd-reason"]) == (400, "bad_body")
    assert answer.error["message"]


async def test_clients_do_not_steer(client: Client) -> None:
    headers = {
        "x-gateway-destination-endpoint": "127.0.0.1:1",
        "x-gateway-destination-endpoint-subset": "127.0.0.1:1",
        "x-pd-id": "mine",
        "x-pd-prefill": "prefill-9",
        "x-prefiller-host-port": "127.0.0.1:1",
        "x-data-parallel-rank": "1",
    }
    answer = await client.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4}, headers)
    assert answer.status == 200
    seen = {name.lower(): value for name, value in (await client.request_of(answer))["headers"].items()}
    assert seen["x-gateway-destination-endpoint"] != "127.0.0.1:1"
    assert not set(headers) - {"x-gateway-destination-endpoint"} & set(seen)
