"""D that ask for the prefill: P that fail, hang or stop, clients that leave, calls that are wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.integration.test_connectors import alone, restarted
from tests.support.processes import NO_EJECTION, Client, Process, Stack, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

PATH = "/v1/completions"
BODY = {"prompt": "D asks, and P writes layer by layer. " * 8, "max_tokens": 12}
COMPLETIONS = [PATH]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), connector="ascend-layerwise") as running:
        yield running


@pytest.fixture(scope="module")
def port() -> int:
    return unused_ports(1)[0]


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack, port: int) -> Iterator[Process]:
    limits = {"strategy": "round_robin", "prefill_timeout": 3.0, "decode_first_byte_timeout": 3.0}
    with spawned(stack.up({**limits, "metaserver_port": port, **NO_EJECTION, **fleet.config()})) as process:
        yield process


@pytest_asyncio.fixture
async def client(client: Client) -> AsyncIterator[Client]:
    """A client whose requests are split; afterwards nothing may be in flight, and no D may wait for P."""
    await client.until_split()
    yield client
    await client.undo_faults()
    await client.until_in_flight(0)
    await until(lambda: nothing_held(client))


async def nothing_held(client: Client) -> bool:
    stats = [await client.json(each.url + "/_sim/stats") for each in client.fleet.instances]
    return all(each["deferred"] == each["blocks_used"] == each["pinned"] == 0 for each in stats)


async def calls(client: Client, outcome: str) -> float:
    _, page = await client.admin("GET", "/metrics")
    name = f'pd_scheduler_metaserver_calls_total{{outcome="{outcome}"}} '
    return next((float(line.removeprefix(name)) for line in page.splitlines() if line.startswith(name)), 0.0)


async def all_prefills(client: Client, **fault: Any) -> None:
    for instance in client.fleet.prefill:
        await client.fault(instance.id, **({"paths": COMPLETIONS, **fault} if fault else {}))


async def test_who_has_prefilled_is_told(client: Client) -> None:
    answer = await client.post(PATH, BODY)
    assert answer.headers["x-pd-prefill"] == "(later)"
    _, found = await client.admin("GET", f"/decisions?request_id={answer.headers['x-request-id']}")
    first, done = found["decisions"][-1]["prefill"]["attempts"]
    assert (first["outcome"], done["outcome"]) == ("reserved", "ok")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429}, {"reset": True}])
async def test_another_p_is_tried(client: Client, fault: dict[str, Any], stream: bool) -> None:
    expected = await alone(client, PATH, BODY)
    await client.fault("prefill-0", paths=COMPLETIONS, **fault)
    for _ in range(4):
        answer = await client.post(PATH, {**BODY, "stream": stream})
        assert (answer.status, answer.text) == (200, expected)
        assert (await client.request_of(answer))["outcomes"] == ["good"]


async def test_a_p_that_dies_at_it(client: Client) -> None:
    """D gets the cache from the other one, in the blocks that it has kept for that."""
    expected = await alone(client, PATH, BODY)

    async def has_its_turn() -> bool:
        return await client.prefilled_by(await client.post(PATH, BODY)) == "prefill-0"

    await until(has_its_turn)  # it was full, or has failed, in the tests before
    before = await client.seen_by_all()
    await client.fault("prefill-0", paths=COMPLETIONS, delay=30)
    answers = [asyncio.ensure_future(client.post(PATH, BODY)) for _ in range(4)]

    async def there() -> bool:
        return bool(await client.seen_since("prefill-0", before["prefill-0"]))

    await until(there)
    await restarted(client, "prefill-0")
    for answer in await asyncio.gather(*answers):
        assert (answer.status, answer.text) == (200, expected)
        assert (await client.request_of(answer))["outcomes"] == ["good"]


@pytest.mark.parametrize("stream", [False, True])
async def test_no_p_can_do_it(client: Client, stream: bool) -> None:
    """The client hears at once that D waits in vain."""
    await all_prefills(client, status=500)
    try:
        answer = await client.post(PATH, {**BODY, "stream": stream})
        assert answer.status == 503
        assert "prefill" in answer.error["message"]
    except aiohttp.ClientPayloadError:
        assert stream, "an answer in one piece has not begun"
    await release_all(client)


async def release_all(client: Client) -> None:
    """Restart the D, whose blocks nobody will write: vLLM keeps them until then."""
    await all_prefills(client)
    for instance in client.fleet.decode:
        await restarted(client, instance.id)
    await client.until_split()


async def test_a_p_that_hangs_is_not_replaced(client: Client) -> None:
    """It may write after another one has, when D's blocks are another prompt's: an error in place of that."""
    await all_prefills(client, delay=30)
    answer = await client.post(PATH, BODY)
    assert answer.status == 503
    seen = [await client.seen(each.id) for each in client.fleet.prefill]
    ids = [dict(each["headers"]).get("X-Request-Id", "") for every in seen for each in every]
    ours = [each for each in ids if each.endswith("-layerwise")]
    assert len(ours) == len(set(ours))
    await release_all(client)


async def test_a_client_that_leaves_after_d_has_asked(client: Client) -> None:
    """P goes on, since D keeps its blocks until they are written."""
    before = await client.seen_by_all()
    await all_prefills(client, delay=2)
    request = asyncio.ensure_future(client.post(PATH, {**BODY, "stream": True}))

    async def asked() -> bool:
        return any([await client.seen_since(each.id, before[each.id]) for each in client.fleet.prefill])

    await until(asked)
    request.cancel()
    await client.until_in_flight(0)
    await until(lambda: nothing_held(client))
    stats = [await client.json(each.url + "/_sim/stats") for each in client.fleet.decode]
    assert sum(each["hand_offs"].get("released", 0) for each in stats) >= 1


@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}])
async def test_a_d_that_fails(client: Client, fault: dict[str, Any]) -> None:
    """Another one gets the client's own body, and computes the prompt."""
    expected = await alone(client, PATH, BODY)
    await client.fault("decode-0", paths=COMPLETIONS, **fault)
    for _ in range(4):
        answer = await client.post(PATH, BODY)
        assert (answer.status, answer.text) == (200, expected)
    await client.until_in_flight(0)


async def test_a_d_that_hangs_before_it_asks(client: Client) -> None:
    expected = await alone(client, PATH, BODY)
    await client.fault("decode-0", paths=COMPLETIONS, delay=30)
    for _ in range(2):
        answer = await client.post(PATH, {**BODY, "stream": True})
        assert (answer.status, answer.text) == (200, expected)


async def test_calls_that_are_wrong(client: Client, port: int) -> None:
    """Nobody gets anything for those."""
    url = f"http://127.0.0.1:{port}/v1/metaserver"
    before = await client.seen_by_all()
    for path, status in (("/guessed", 404), ("", 404), ("/a/b", 404)):
        async with client.session.post(url + path, json={"request_id": "cmpl-1-0"}) as response:
            assert response.status == status
            assert "error" in await response.json()
    assert await calls(client, "unknown") == 1
    for instance in client.fleet.prefill:
        assert not await client.seen_since(instance.id, before[instance.id])


async def url_of_a_waiting_request(client: Client) -> tuple[asyncio.Future[Any], dict[str, Any], str]:
    """Send a request that no D serves yet, and return what its D was told."""
    before = await client.seen_by_all()
    for instance in client.fleet.decode:
        await client.fault(instance.id, paths=COMPLETIONS, delay=1.5)
    answer = asyncio.ensure_future(client.post(PATH, {**BODY, "stream": True}))
    told: list[tuple[str, dict[str, Any]]] = []

    async def there() -> bool:
        for instance in client.fleet.decode:
            for seen in await client.seen_since(instance.id, before[instance.id]):
                name = next(v for k, v in seen["headers"].items() if k.lower() == "x-request-id")
                told.append((name, json.loads(seen["body"])["kv_transfer_params"]))
        return bool(told)

    await until(there)
    (name, params), *_ = told
    assert (params["do_remote_decode"], params["do_remote_prefill"]) == (False, True)
    call = {
        "request_id": f"cmpl-{name}-0",
        "do_remote_decode": True,
        "remote_block_ids": [[1]],
        "remote_engine_id": "evil",
        "remote_host": "127.0.0.9",
        "remote_port": 9,
        "remote_cached_tokens": 0,
    }
    return answer, call, params["metaserver"]


async def test_a_call_from_elsewhere(client: Client) -> None:
    expected = await alone(client, PATH, BODY)
    answer, call, url = await url_of_a_waiting_request(client)
    before = await calls(client, "elsewhere")
    other = aiohttp.TCPConnector(local_addr=("127.0.0.3", 0))
    with client.frozen("decode-0", "decode-1"):  # its own D asks after that
        async with (
            aiohttp.ClientSession(connector=other) as session,
            session.post(url, json=call) as response,
        ):
            assert response.status == 403
    assert await calls(client, "elsewhere") == before + 1
    assert (await answer).text == expected


async def test_a_call_that_makes_no_sense(client: Client) -> None:
    answer, call, url = await url_of_a_waiting_request(client)
    with client.frozen("decode-0", "decode-1"):
        async with client.session.post(url, json={**call, "request_id": "cmpl-another-0"}) as response:
            assert response.status == 400
    assert (await answer).status == 502
    assert await calls(client, "unreadable") == 1


async def test_a_call_that_comes_too_late(client: Client) -> None:
    """Of a request that has ended, and after D could still have asked."""
    answer, call, url = await url_of_a_waiting_request(client)
    assert (await answer).status == 200
    before = await client.seen_by_all()

    async def forgotten() -> bool:
        async with client.session.post(url, json=call) as response:
            return response.status == 404

    await until(forgotten)
    for instance in client.fleet.prefill:
        assert not await client.seen_since(instance.id, before[instance.id])
