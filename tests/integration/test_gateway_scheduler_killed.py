"""A scheduler that is killed, or told to end, while a gateway asks it: what survives in this mode."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.gateway import Gateway, Running, gateway_client, gateway_ready, gateway_running
from tests.support.processes import Answer, Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

PROMPT = "Whose is the cache? " * 40
SLOW = replace(EngineProfile.instant(), decode_base=0.02)
STREAM = {"prompt": PROMPT, "stream": True, "max_tokens": 100, "ignore_eos": True}
ENDLESS = {**STREAM, "max_tokens": 3000}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 2, profile=SLOW, arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture
def gateway(request: pytest.FixtureRequest) -> Gateway:
    return getattr(request, "param", Gateway())  # type: ignore[no-any-return]


@pytest.fixture
def running(fleet: Fleet, tmp_path: Path, gateway: Gateway) -> Iterator[Running]:
    config: dict[str, Any] = {"strategy": "round_robin", "health_check_interval": 0.2, **fleet.config()}
    with gateway_running(tmp_path, gateway, config) as started:
        yield started


@pytest_asyncio.fixture
async def client(running: Running, fleet: Fleet) -> AsyncIterator[Client]:
    async with gateway_client(running, fleet) as client:
        yield client
        for instance in fleet.instances:
            await client.fault(instance.id)


def kill(running: Running) -> None:
    running.scheduler.signal(signal.SIGKILL)
    running.scheduler.wait()


async def complete(client: Client, **body: Any) -> Answer:
    return await client.complete(prompt=PROMPT, **body)


async def split_again(client: Client, running: Running) -> None:
    """Restart the scheduler, and see that all is as before."""
    running.restart_scheduler()
    await gateway_ready(client, running)
    answer = await complete(client)
    assert (await client.request_of(answer))["hand_off"] == "receive"


async def test_before_a_request_it_passes_to_any_d(client: Client, running: Running) -> None:
    kill(running)

    async def found_out() -> bool:
        answer = await complete(client)
        return answer.status == 200 and "x-pd-prefill" not in answer.headers

    await until(found_out)
    answers = await asyncio.gather(*(complete(client) for _ in range(20)))
    assert {answer.status for answer in answers} == {200}
    answer = await complete(client, kv_transfer_params={"do_remote_prefill": True})
    assert answer.status == 400, "nobody has cut it out"
    await split_again(client, running)


@pytest.mark.parametrize(
    "gateway",
    [Gateway(failure_mode_allow=False), Gateway(cluster="original_dst")],
    indirect=True,
    ids=["fail closed", "no hosts known"],
)
async def test_before_a_request_that_may_not_pass(client: Client, running: Running) -> None:
    kill(running)
    assert (await complete(client)).status in (500, 503)
    await split_again(client, running)


async def test_during_prefill_it_fails(client: Client, running: Running) -> None:
    """Envoy cannot fail open when body data has gone to the scheduler."""
    await client.fault("prefill-0", delay=30.0)
    before = await client.seen_by_all()
    request = asyncio.ensure_future(complete(client))

    async def at_p() -> bool:
        return bool(await client.seen_since("prefill-0", before["prefill-0"]))

    await until(at_p)
    kill(running)
    assert (await request).status in (500, 503, 504)
    await client.fault("prefill-0")
    await split_again(client, running)


@pytest.mark.parametrize("stream", [False, True])
async def test_while_decode_has_it_the_request_fails(client: Client, running: Running, stream: bool) -> None:
    for instance in client.fleet.decode:
        await client.fault(instance.id, delay=3600.0)
    before = await client.seen_by_all()
    request = asyncio.ensure_future(complete(client, stream=stream))

    async def at_d() -> bool:
        return any([await client.seen_since(one.id, before[one.id]) for one in client.fleet.decode])

    await until(at_d)
    kill(running)
    outcome = await asyncio.gather(request, return_exceptions=True)
    assert not (isinstance(outcome[0], Answer) and outcome[0].status == 200), outcome
    for instance in client.fleet.decode:
        await client.fault(instance.id)
    await split_again(client, running)


async def streaming(client: Client, body: dict[str, Any] = STREAM) -> tuple[aiohttp.ClientResponse, bytes]:
    response = await client.session.post(client.stack.url + "/v1/completions", json=body)
    assert response.status == 200
    return response, await response.content.readline()


@pytest.mark.parametrize("gateway", [Gateway(), Gateway(response_body="NONE")], indirect=True)
async def test_in_mid_stream_the_stream_is_cut(client: Client, running: Running) -> None:
    """Also if no token passes through: Envoy waits for the answer's trailers, which it would send."""
    response, _ = await streaming(client, ENDLESS)
    kill(running)
    with pytest.raises(aiohttp.ClientError):
        await response.content.read()
    await split_again(client, running)


@pytest.mark.parametrize("gateway", [Gateway(response_body="NONE", response_trailers="SKIP")], indirect=True)
async def test_in_mid_stream_it_goes_on_if_nothing_of_it_is_sent(client: Client, running: Running) -> None:
    """The call ends when the answer has begun, so the scheduler does not know what runs."""
    response, text = await streaming(client)
    assert await client.in_flight() == 0
    kill(running)
    text += await response.content.read()
    assert text.endswith(b"data: [DONE]\n\n")
    await split_again(client, running)


async def test_one_that_is_told_to_end_lets_streams_end(client: Client, running: Running) -> None:
    response, text = await streaming(client)
    running.scheduler.signal(signal.SIGTERM)
    text += await response.content.read()
    assert text.endswith(b"data: [DONE]\n\n")
    assert running.scheduler.wait() == 0
    await split_again(client, running)


async def test_under_load_nothing_hangs(client: Client, running: Running) -> None:
    """Each client gets an answer or an error, and after the restart answers again."""
    requests = [asyncio.ensure_future(complete(client, stream=n % 2 > 0, max_tokens=20)) for n in range(40)]
    await until(lambda: any(each.done() for each in requests))  # others are everywhere on their ways
    kill(running)
    await asyncio.gather(*requests, return_exceptions=True)
    await split_again(client, running)
    await client.until_in_flight(0)
