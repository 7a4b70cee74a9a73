"""Simulated engines that push: P finds what D asks for by the request's id."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.sim import BODY, COMPLETIONS, SEND, Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 2, profile=EngineProfile.instant(), arguments=["--kv-connector=nixl-push"]) as running:
        yield running


async def prefill(client: Client, fleet: Fleet, name: str, **more: Any) -> Any:
    body = {**BODY, **more, "max_tokens": 1, "kv_transfer_params": SEND}
    return (await client.post(fleet["prefill-0"], COMPLETIONS, body, **{"x-request-id": name}))[
        "kv_transfer_params"
    ]


async def decode(client: Client, fleet: Fleet, name: str, params: Any, **more: Any) -> Any:
    body = {**BODY, "kv_transfer_params": params, **more}
    return await client.post(fleet["decode-0"], COMPLETIONS, body, **{"x-request-id": name})


async def pinned(client: Client, fleet: Fleet) -> int:
    return int((await client.stats(fleet["prefill-0"]))["pinned"])


async def test_the_same_id_on_both_legs(fleet: Fleet, client: Client) -> None:
    local = await client.text(fleet["decode-1"], BODY)
    params = await prefill(client, fleet, "a")
    assert params["transfer_mode"] == "push"
    assert "remote_blocks_expiry_time" not in params
    answer = await decode(client, fleet, "a", {**params, "remote_block_ids": [[1]]})
    assert answer["choices"][0]["text"] == local
    assert (await client.last(fleet["decode-0"]))["outcomes"] == ["good"]
    assert await pinned(client, fleet) == 0


async def test_another_id_waits_for_ever_and_frees_nothing(fleet: Fleet, client: Client) -> None:
    params = await prefill(client, fleet, "b")
    waiting = asyncio.ensure_future(decode(client, fleet, "c", params))

    async def deferred() -> bool:
        return bool((await client.stats(fleet["decode-0"]))["deferred"] == 1)

    await until(deferred)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await pinned(client, fleet) == 1
    await decode(client, fleet, "b", params, prompt="x", max_tokens=1)
    assert await pinned(client, fleet) == 0
    assert (await client.last(fleet["decode-0"]))["outcomes"] == ["released"]


async def test_an_id_that_two_requests_have_gives_a_wrong_text(fleet: Fleet, client: Client) -> None:
    """P sends the first that it finds."""
    local = await client.text(fleet["decode-1"], BODY)
    await prefill(client, fleet, "d", prompt=BODY["prompt"][::-1])
    params = await prefill(client, fleet, "d")
    answer = await decode(client, fleet, "d", params)
    assert answer["choices"][0]["text"] != local
    assert await decode(client, fleet, "d", params)
    assert await pinned(client, fleet) == 0


async def test_a_request_that_is_refused_frees_nothing(fleet: Fleet, client: Client) -> None:
    params = await prefill(client, fleet, "e")
    await decode(client, fleet, "e", params, max_tokens=2**31 - 1)
    assert client.status == 400
    assert await pinned(client, fleet) == 1
    await decode(client, fleet, "e", params, prompt="x", max_tokens=1)


@pytest.mark.parametrize("key", ["tp_size", "remote_host"])
async def test_without_what_it_reads_the_decode_engine_dies(fleet: Fleet, client: Client, key: str) -> None:
    params = await prefill(client, fleet, "f")
    del params[key]
    try:
        await decode(client, fleet, "f", params)
        assert await asyncio.to_thread(fleet["decode-0"].process.wait, HUNG_S) == 1
    finally:
        fleet.restart("decode-0")
