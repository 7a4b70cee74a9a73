"""D that ask for the prefill, behind a gateway that speaks the endpoint-picker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.integration.test_connectors import alone, restarted
from tests.support.gateway import Gateway, Running, gateway_client, gateway_running
from tests.support.processes import NO_EJECTION, Client, unused_ports
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile

PATH = "/v1/completions"
BODY = {"prompt": "D asks, and P writes layer by layer. " * 8, "max_tokens": 12}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), connector="ascend-layerwise") as running:
        yield running


@pytest.fixture(scope="module")
def running(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    (port,) = unused_ports(1)
    config = {"strategy": "round_robin", "metaserver_port": port, **NO_EJECTION, **fleet.config()}
    with gateway_running(Path(tmp_path_factory.mktemp("gateway")), Gateway(), config) as started:
        yield started


@pytest_asyncio.fixture
async def client(running: Running, fleet: Fleet) -> AsyncIterator[Client]:
    async with gateway_client(running, fleet) as client:
        yield client
        for instance in fleet.instances:
            await client.fault(instance.id)
        await client.until_in_flight(0)
        assert "Traceback" not in running.scheduler.output


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_split(client: Client, stream: bool) -> None:
    expected = await alone(client, PATH, BODY)
    for _ in range(4):
        answer = await client.post(PATH, {**BODY, "stream": stream})
        assert (answer.status, answer.text) == (200, expected)
        assert answer.headers["x-pd-prefill"]
        number = (await client.seen(answer.headers["x-pd-decode"]))[-1]
        assert number["outcomes"] == ["good"]


@pytest.mark.parametrize("stream", [False, True])
async def test_no_p_can_do_it(client: Client, stream: bool) -> None:
    for instance in client.fleet.prefill:
        await client.fault(instance.id, paths=[PATH], status=500)
    try:
        assert (await client.post(PATH, {**BODY, "stream": stream})).status == 503
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
        assert stream, "an answer in one piece has not begun"
    for instance in client.fleet.prefill:
        await client.fault(instance.id)
    for instance in client.fleet.decode:  # which keep blocks until they are written
        await restarted(client, instance.id)
    assert (await client.post(PATH, BODY)).status == 200
