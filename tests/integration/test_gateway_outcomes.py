"""What a gateway's answers say of instances, and what becomes of hand-offs: as with our own Envoy's logs."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.gateway import Gateway, Running, gateway_client, gateway_running
from tests.support.processes import Answer, Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

PROMPT = "Whose is the cache? " * 40
SLOW = replace(EngineProfile.instant(), decode_base=0.02)
ENDLESS = {"stream": True, "max_tokens": 3000, "ignore_eos": True}
RETRIES = Gateway(retry_on="5xx,reset,connect-failure,gateway-error")
"""What no gateway may do; the scheduler sets x-envoy-max-retries where it can."""
DEAF = replace(RETRIES, ext_proc={"mutation_rules": {}})
"""One where it cannot."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 3, profile=SLOW, arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(getattr(request, "param", {}))


@pytest.fixture
def gateway(request: pytest.FixtureRequest) -> Gateway:
    return getattr(request, "param", Gateway())  # type: ignore[no-any-return]


@pytest.fixture
def running(fleet: Fleet, tmp_path: Path, gateway: Gateway, settings: dict[str, Any]) -> Iterator[Running]:
    config = {
        "strategy": "round_robin",
        "health_check_interval": 0.2,
        "ejection_pause": 300.0,
        **fleet.config(),
    }
    with gateway_running(tmp_path, gateway, {**config, **settings}) as started:
        yield started


@pytest_asyncio.fixture
async def client(running: Running, fleet: Fleet) -> AsyncIterator[Client]:
    async with gateway_client(running, fleet) as client:
        yield client
        for instance in fleet.instances:
            if not instance.alive:
                await asyncio.to_thread(fleet.restart, instance.id)
            await client.fault(instance.id)
        assert "Traceback" not in running.scheduler.output


async def complete(client: Client, **body: Any) -> Answer:
    return await client.complete(prompt=PROMPT, **body)


async def metric(client: Client, name: str, **labels: str) -> float:
    """Return the sum of a metric's series with these labels."""
    _, page = await client.admin("GET", "/metrics")
    lines = [line for line in page.splitlines() if line.startswith(name + "{")]
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(each in line for each in wanted))


async def until_failure(client: Client, failure: str) -> None:
    async def told() -> bool:
        return await metric(client, "pd_scheduler_decode_attempt_failures_total", failure=failure) > 0

    await until(told)


async def ejected(client: Client, name: str) -> bool:
    return str((await client.instance(name))["reason"]).startswith("ejected: ")


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
async def test_no_status_of_decode_leaves_a_hand_off(client: Client, status: int) -> None:
    await client.fault("decode-0", status=status, times=1)
    answers = [await complete(client) for _ in client.fleet.decode]
    assert sorted(answer.status for answer in answers) == sorted([200, 200, status])
    await client.until_freed()
    await client.until_in_flight(0)


async def test_a_d_that_fails_is_ejected(client: Client) -> None:
    await client.fault("decode-1", status=500)

    async def found() -> bool:
        await complete(client)
        return await ejected(client, "decode-1")

    await until(found)
    assert {(await complete(client)).status for _ in range(6)} == {200}


async def test_a_d_that_refuses_our_requests_is_ejected(client: Client) -> None:
    """P has said 200 to what it refuses."""
    await client.fault("decode-1", status=401)

    async def found() -> bool:
        await complete(client)
        return await ejected(client, "decode-1")

    await until(found)


@pytest.mark.parametrize("status", [429, 503])
async def test_full_is_not_broken(client: Client, status: int) -> None:
    await client.fault("decode-0", status=status)
    answers: list[Answer] = []
    began = time.monotonic()

    def at_most() -> int:
        """It is left alone for half a second, and twice as long each time."""
        return 1 + int(math.log2(1 + (time.monotonic() - began) / 0.5))

    while len(answers) / len(client.fleet.decode) <= at_most():  # each has had more in its turn
        answers.append(await complete(client))
    assert {answer.status for answer in answers} == {200, status}
    assert sum(answer.status == status for answer in answers) <= at_most()
    assert not [name for name, state in (await client.states()).items() if state != "healthy"]


@pytest.mark.parametrize("settings", [{"health_check_interval": 60.0}], indirect=True)
async def test_a_d_that_is_gone(client: Client) -> None:
    client.fleet.kill("decode-2")

    async def found() -> bool:
        answer = await complete(client)
        assert answer.status in (200, 503)
        return await ejected(client, "decode-2")

    await until(found)
    assert await metric(client, "pd_scheduler_decode_attempt_failures_total", failure="connect") > 0
    await client.until_freed()


async def test_a_d_that_resets_connections_is_ejected(client: Client) -> None:
    await client.fault("decode-1", reset=True)

    async def found() -> bool:
        await complete(client, user=str(asyncio.get_running_loop().time()))
        return await ejected(client, "decode-1")

    await until(found)
    assert await metric(client, "pd_scheduler_decode_attempt_failures_total", failure="reset") > 0
    await client.until_freed()


async def test_a_client_that_leaves_before_an_answer(client: Client) -> None:
    for instance in client.fleet.decode:
        await client.fault(instance.id, delay=3600.0)
    before = await client.seen_by_all()
    request = asyncio.ensure_future(complete(client))

    async def at_decode() -> bool:
        return any([await client.seen_since(one.id, before[one.id]) for one in client.fleet.decode])

    await until(at_decode)
    request.cancel()
    for instance in client.fleet.decode:
        await client.fault(instance.id)  # it is a D that has P free a hand-off
    await client.until_in_flight(0)
    await until_failure(client, "left")
    await client.until_freed()


async def test_a_client_that_leaves_during_prefill(client: Client) -> None:
    for instance in client.fleet.prefill:
        await client.fault(instance.id, delay=30.0)
    request = asyncio.ensure_future(complete(client))

    async def at_prefill() -> bool:
        return await client.in_flight() > 0

    await until(at_prefill)
    request.cancel()
    await client.until_in_flight(0)


async def test_a_client_that_leaves_in_mid_stream(client: Client) -> None:
    async with client.session.post(
        client.stack.url + "/v1/completions", json={"prompt": PROMPT, **ENDLESS}
    ) as response:
        await response.content.readline()
        assert await client.in_flight() == 1
    await client.until_in_flight(0)
    await until_failure(client, "broken_off")
    assert not [name for name, state in (await client.states()).items() if state != "healthy"]
    await client.until_freed()


async def test_a_stream_that_d_cuts(client: Client) -> None:
    for instance in client.fleet.decode:
        await client.fault(instance.id, half=True)
    with pytest.raises(aiohttp.ClientError):
        await complete(client, stream=True)
    await client.until_in_flight(0)
    await until_failure(client, "broken_off")


@pytest.mark.parametrize(
    "settings", [{"decode_first_byte_timeout": 1.0, "decode_seconds_per_token": 0.0}], indirect=True
)
async def test_a_d_that_does_not_answer_in_time(client: Client) -> None:
    """Without our Envoy's time limit, the scheduler itself answers: the hand-off is too old after that."""
    for instance in client.fleet.decode:
        await client.fault(instance.id, delay=3600.0)
    answer = await complete(client)
    assert (answer.status, answer.headers["x-pd-reason"]) == (504, "decode_timeout")
    assert answer.error["message"]
    await until_failure(client, "timeout")
    await client.until_in_flight(0)


async def test_what_is_told_of_an_answer(client: Client) -> None:
    answer = await complete(client, stream=True, max_tokens=20)
    assert answer.status == 200

    async def counted() -> bool:
        return await metric(client, "pd_scheduler_responses_total", outcome="ok") > 0

    await until(counted)
    _, found = await client.admin("GET", "/decisions")
    decision = found["decisions"][0]
    assert decision["outcome"] == "ok"
    assert decision["decode"]["attempts"] == [{"instance": answer.headers["x-pd-decode"], "outcome": "ok"}]
    assert 0 < decision["ttft_s"] <= decision["duration_s"]


@pytest.mark.parametrize("gateway", [RETRIES], indirect=True)
@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}], ids=str)
async def test_a_hand_off_is_sent_once_also_by_a_gateway_that_retries(
    client: Client, fault: dict[str, Any]
) -> None:
    await complete(client)
    for instance in client.fleet.decode:
        await client.fault(instance.id, **fault)
    before = await client.seen_by_all()
    answer = await complete(client)
    assert answer.status in (500, 503)
    sent = [each for one in client.fleet.decode for each in await client.seen_since(one.id, before[one.id])]
    ids = [
        value for each in sent for name, value in each["headers"].items() if name.lower() == "x-request-id"
    ]
    assert ids.count(answer.headers["x-request-id"]) == 1


@pytest.mark.parametrize(
    "gateway",
    [replace(DEAF, cluster=cluster) for cluster in ("decode", "original_dst")],
    indirect=True,
    ids=["override_host", "original_dst"],
)
async def test_an_answer_after_a_retry_with_a_hand_off_is_not_let_through(client: Client) -> None:
    """The hand-off may name the blocks of another prompt by then."""
    for instance in client.fleet.decode:
        await client.fault(instance.id, status=500, times=1)
    answer = await complete(client)
    assert (answer.status, answer.headers["x-pd-reason"]) == (503, "handoff_sent_twice")


async def test_without_a_hand_off_there_are_fallbacks(client: Client) -> None:
    """Once the gateway has told who serves, so that it is known to take a list."""
    for instance in client.fleet.prefill:
        await client.fault(instance.id, status=500)
    destinations = []
    for _ in range(3):
        answer = await complete(client)
        assert answer.status == 200
        seen = await client.request_of(answer)
        assert seen["hand_off"] is None
        headers = {name.lower(): value for name, value in seen["headers"].items()}
        destinations.append(headers["x-gateway-destination-endpoint"])
    assert all("," in each for each in destinations[1:]), destinations


@pytest.mark.parametrize("gateway", [Gateway(cluster="original_dst")], indirect=True)
async def test_an_original_dst_is_given_one_destination(client: Client) -> None:
    for instance in client.fleet.prefill:
        await client.fault(instance.id, status=500)
    assert {(await complete(client)).status for _ in range(4)} == {200}


@pytest.mark.parametrize("gateway", [DEAF], indirect=True)
@pytest.mark.parametrize("settings", [{"disaggregation": "never"}], indirect=True)
async def test_a_fallback_that_serves_is_where_the_request_counts(client: Client) -> None:
    await complete(client)
    await client.fault("decode-0", status=500)
    for _ in range(6):
        answer = await complete(client)
        assert answer.status == 200
        assert answer.headers["x-pd-decode"] != "decode-0"
    await until_failure(client, "passed_over")


@pytest.mark.parametrize("form", ["list", "text", "ip"])
async def test_a_subset(fleet: Fleet, tmp_path: Path, form: str) -> None:
    chosen = f"127.0.0.1:{fleet['decode-1'].port}"
    subset = {"list": [chosen, "10.0.0.9:80"], "text": f"{chosen}, 10.0.0.9:80", "ip": ["127.0.0.1"]}[form]
    config = {"strategy": "round_robin", **fleet.config()}
    with gateway_running(tmp_path, Gateway(subset=subset), config) as running:
        async with gateway_client(running, fleet) as client:
            answers = [await complete(client) for _ in range(6)]
            assert {answer.status for answer in answers} == {200}
            served = {answer.headers["x-pd-decode"] for answer in answers}
            assert served == ({each.id for each in fleet.decode} if form == "ip" else {"decode-1"})
            assert {answer.headers["x-pd-prefill"] for answer in answers} == {
                each.id for each in fleet.prefill
            }


@pytest.mark.parametrize("subset", [["10.0.0.9:80"], [], ""], ids=["strangers", "empty list", "empty text"])
async def test_a_subset_of_nobody(fleet: Fleet, tmp_path: Path, subset: list[str] | str) -> None:
    with gateway_running(tmp_path, Gateway(subset=subset), fleet.config()) as running:
        async with gateway_client(running, fleet) as client:
            before = await client.seen_by_all()
            answer = await complete(client)
            assert (answer.status, answer.headers["x-pd-reason"]) == (503, "no_decode")
            assert await client.seen_by_all() == before, "nothing was prefilled"


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("settings", [{"max_body_bytes": 1 << 20}], indirect=True)
async def test_a_body_that_is_too_large(client: Client, announced: bool) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(3 << 4):
            yield b" " * (1 << 16)

    data = body() if not announced else b" " * (3 << 20)
    async with client.session.post(client.stack.url + "/v1/completions", data=data) as response:
        text = await response.read()
        assert (response.status, response.headers["x-pd-reason"]) == (413, "too_large")
        assert json.loads(text)["error"]["code"] == 413
    assert (await complete(client)).status == 200


async def test_a_client_that_sends_slowly_takes_no_memory_of_the_schedulers(client: Client) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9000000\r\n\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", int(client.stack.url.rpartition(":")[2]))
    writer.write(head + b" " * 8_000_000)
    await writer.drain()
    assert (await complete(client)).status == 200
    _, metrics = await client.admin("GET", "/metrics")
    assert "\npd_scheduler_held_bytes 0.0\n" in metrics
    writer.close()


async def test_nobody_can_serve(client: Client) -> None:
    for instance in client.fleet.decode:
        await client.admin("POST", f"/instances/{instance.id}/drain?force=true")
    answer = await complete(client)
    assert (answer.status, answer.headers["x-pd-reason"]) == (503, "no_decode")
    assert answer.error["type"] == "ServiceUnavailableError"
