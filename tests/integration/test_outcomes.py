"""What a request's end says of its instances, and what becomes of its hand-off, on a real Envoy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import Answer, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

PROMPT = "Whose is the cache? " * 40


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(3, 3, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """One for each test, since what a scheduler has learned of its instances stays."""
    return Stack(tmp_path)


@pytest.fixture
def up(fleet: Fleet, stack: Stack, request: pytest.FixtureRequest) -> Iterator[Process]:
    defaults = {"strategy": "round_robin", "health_check_interval": 0.2, "ejection_pause": 300.0}
    with spawned(stack.up({**defaults, **getattr(request, "param", {}), **fleet.config()})) as process:
        yield process


@pytest_asyncio.fixture
async def client(client: Client, fleet: Fleet, up: Process) -> AsyncIterator[Client]:
    """Restart what has died."""
    yield client
    assert "Traceback" not in up.output
    for instance in fleet.instances:
        if not instance.alive:
            await asyncio.to_thread(fleet.restart, instance.id)


async def complete(client: Client, **body: Any) -> Answer:
    return await client.complete(prompt=PROMPT, **body)


async def pinned(client: Client) -> int:
    """Hand-offs that P holds: blocks that nobody has fetched or freed."""
    stats = [await client.json(each.url + "/_sim/stats") for each in client.fleet.prefill if each.alive]
    return sum(each["pinned"] for each in stats)


async def until_freed(client: Client) -> None:
    """Wait until P holds nothing; its lease, 30 s, would be too late."""

    async def freed() -> bool:
        return await pinned(client) == 0

    await until(freed)


async def ejected(client: Client, name: str) -> bool:
    return str((await client.instance(name))["reason"]).startswith("ejected: ")


@pytest.mark.parametrize(
    "body",
    [{"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": "abc"}, {"stream": "perhaps"}],
)
async def test_what_only_decode_refuses_leaves_nothing_on_prefill(
    client: Client, body: dict[str, Any]
) -> None:
    answer = await complete(client, **body)
    assert 400 <= answer.status < 500
    await until_freed(client)
    assert (await complete(client)).status == 200


@pytest.mark.parametrize("status", [204, 307, 400, 401, 404, 413, 422, 429, 503])
async def test_no_status_of_decode_leaves_a_hand_off(client: Client, status: int) -> None:
    await client.fault("decode-0", status=status, times=1)  # not what comes to free a hand-off
    for _ in client.fleet.decode:
        await complete(client)
    await until_freed(client)


async def test_a_body_that_does_not_fit_with_its_hand_off(client: Client) -> None:
    """Envoy would answer 413 between the scheduler and D."""
    room = 64 * 2**20 - len(PROMPT) - 200
    answer = await complete(client, padding="x" * room)
    assert answer.status == 200
    assert "x-pd-prefill" not in answer.headers
    await until_freed(client)


async def test_a_body_that_just_fits_with_its_hand_off(client: Client) -> None:
    room = 64 * 2**20 - len(PROMPT) - 2000
    answers = [await complete(client, padding="x" * (room if large else 1)) for large in (False, True, True)]
    assert len({answer.text for answer in answers}) == 1
    assert all("x-pd-prefill" in answer.headers for answer in answers)
    fetched = [(await client.request_of(answer))["hand_off"] for answer in answers]
    assert fetched == ["receive"] * 3
    await until_freed(client)


async def test_another_model_on_one_p_is_found_and_hurts_nobody(client: Client) -> None:
    await client.fault("prefill-1", status=404)
    answers = [await complete(client) for _ in range(15)]
    assert {answer.status for answer in answers} == {200}
    await until(lambda: ejected(client, "prefill-1"))


async def test_another_model_on_one_d_is_found_and_hurts_nobody(client: Client) -> None:
    await client.fault("decode-1", status=404)
    answers = [await complete(client) for _ in range(15)]
    assert {answer.status for answer in answers} == {200}
    await until(lambda: ejected(client, "decode-1"))


async def test_an_unknown_model_is_the_clients_mistake(client: Client) -> None:
    answers = [await complete(client, model="nobody-has-it") for _ in range(12)]
    assert {answer.status for answer in answers} == {404}
    assert not [name for name, state in (await client.states()).items() if state != "healthy"]


async def test_full_is_not_broken(client: Client) -> None:
    await client.fault("decode-0", status=503)
    await client.fault("prefill-0", status=429)
    answers = [await complete(client) for _ in range(12)]
    assert {answer.status for answer in answers} == {200}
    assert not [name for name, state in (await client.states()).items() if state != "healthy"]


async def test_clients_that_give_up_on_a_hung_d_do_not_make_it_a_good_one(client: Client) -> None:
    await client.fault("decode-2", delay=3600.0)

    async def gone() -> bool:
        before = (await client.seen_by_all())["decode-2"]
        request = asyncio.ensure_future(complete(client))

        async def answered_or_there() -> bool:
            return request.done() or bool(await client.seen_since("decode-2", before))

        await until(answered_or_there)
        request.cancel()
        return await ejected(client, "decode-2")

    await until(gone)


@pytest.mark.parametrize(
    "up",
    [
        {"stream_idle_timeout": 0.5},
        # Envoy forgets the limit of an attempt's pauses when that of its first byte is over.
        {"stream_idle_timeout": 4.0, "decode_first_byte_timeout": 2.0},
    ],
    indirect=True,
    ids=["at its beginning", "later"],
)
@pytest.mark.parametrize("tokens", [0, 3])
async def test_a_stream_that_falls_silent_is_cut_and_counts(client: Client, tokens: int) -> None:
    """vLLM sends the headers before the first token, so a D whose engine hangs has answered in time."""
    for instance in client.fleet.decode:
        await client.fault(instance.id, mute=tokens)
    with pytest.raises(aiohttp.ClientError):
        await complete(client, stream=True)

    async def counted() -> bool:
        _, page = await client.admin("GET", "/metrics")
        return 'failure="cut"' in page

    await until(counted)


@pytest.mark.parametrize(
    "up", [{"decode_first_byte_timeout": 1.0, "decode_seconds_per_token": 0.0}], indirect=True
)
async def test_what_is_not_split_has_a_time_limit_too(client: Client) -> None:
    for instance in client.fleet.decode:
        await client.fault(instance.id, delay=3600.0)
    for method, path, body in (("POST", "/v1/embeddings", {"input": "x"}), ("GET", "/v1/completions", None)):
        answer = await client.send(method, path, body)
        assert (answer.status, answer.error["code"]) == (504, 504)


@pytest.mark.parametrize("up", [{"stream_idle_timeout": 4.0}], indirect=True)
async def test_an_engine_that_hangs_behind_its_server_gets_no_more_requests(client: Client) -> None:
    endless = {"stream": True, "max_tokens": 3000, "ignore_eos": True}
    streams = [asyncio.ensure_future(complete(client, **endless)) for _ in client.fleet.decode]

    async def runs() -> bool:
        return bool((await client.json(client.fleet["decode-1"].url + "/_sim/stats"))["running"])

    await until(runs)
    await client.fault("decode-1", stuck=True)

    async def found() -> bool:
        instance = await client.instance("decode-1")
        said = str(instance["reason"]).startswith("its engine stands still: ")
        return said and instance["state"] == "unhealthy"

    await until(found)
    answers = [await complete(client, stream=True) for _ in client.fleet.decode]
    assert {answer.status for answer in answers} == {200}
    await asyncio.gather(*streams, return_exceptions=True)
    await client.fault("decode-1")

    async def healthy() -> bool:
        return (await client.states())["decode-1"] == "healthy"

    await until(healthy)


@pytest.mark.parametrize("abrupt", [False, True], ids=["engine dies", "process dies"])
async def test_a_prompt_that_kills_has_two_instances_at_most(client: Client, abrupt: bool) -> None:
    for instance in client.fleet.instances:
        await client.fault(instance.id, poison="kills engines", abrupt=abrupt)
    killer = {"prompt": f"{PROMPT} This one kills engines.", "max_tokens": 4}
    answer = await client.post("/v1/completions", killer)
    assert answer.status == 503

    async def dead() -> bool:
        return sum(not each.alive for each in client.fleet.instances) == 2

    await until(dead)

    async def refused() -> bool:
        found = await client.post("/v1/completions", {**killer, "max_tokens": 5})
        return found.headers.get("x-pd-reason") == "lost"

    assert await refused()
    assert sum(not each.alive for each in client.fleet.instances) == 2
    assert (await complete(client)).status == 200, "the others serve"
