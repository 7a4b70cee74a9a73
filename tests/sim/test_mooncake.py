"""Mooncake between simulated engines: names of the router's, and engines that wait or die where vLLM's do."""

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support.sim import BODY, COMPLETIONS, Client
from tests.support.sim_fleet import Fleet, SimInstance
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    profile = replace(EngineProfile.instant(), lease=480)
    arguments = ["--load-fail-delay=0.02", "--max-model-len=4096"]
    with Fleet(2, 2, profile=profile, arguments=arguments, connector="mooncake") as running:
        yield running


async def prefill(client: Client, p: SimInstance, **more: Any) -> dict[str, Any]:
    """Return the parameters for D; P's answer has none."""
    transfer_id = f"xfer-{uuid.uuid4().hex}"
    params = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    body = {**BODY, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": params, **more}
    answer = await client.post(p, COMPLETIONS, body)
    assert client.status == 200, answer
    assert answer["kv_transfer_params"] is None
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": transfer_id,
        "remote_bootstrap_addr": p.url,
        "remote_engine_id": (await engine(client, p))["engine_id"],
    }


async def engine(client: Client, p: SimInstance) -> dict[str, Any]:
    (found,) = (await client.get(p, "/query")).values()
    assert found["worker_addr"] == {"0": {"0": f"tcp://{p.host}:{p.port}"}}
    return dict(found)


async def test_hand_off_gives_the_same_text_and_frees_the_blocks(fleet: Fleet, client: Client) -> None:
    p, d = fleet["prefill-0"], fleet["decode-0"]
    local = await client.text(fleet["decode-1"], BODY)
    params = await prefill(client, p)
    assert (await client.stats(p))["pinned"] == 1
    assert await client.text(d, BODY, params) == local
    assert (await client.last(d))["outcomes"] == ["good"]
    assert (await client.stats(p))["pinned"] == 0


async def test_a_hand_off_of_another_prompt_gives_wrong_text(fleet: Fleet, client: Client) -> None:
    params = await prefill(client, fleet["prefill-0"], prompt="another one " * 30)
    assert await client.text(fleet["decode-0"], BODY, params) != await client.text(fleet["decode-0"], BODY)


async def test_a_name_that_is_used_again_makes_d_wait(fleet: Fleet, client: Client) -> None:
    params = await prefill(client, fleet["prefill-0"])
    await client.text(fleet["decode-0"], BODY, params)
    await assert_waits(client, fleet["decode-1"], params)


async def test_after_a_stop_d_waits(fleet: Fleet, client: Client) -> None:
    p = fleet["prefill-0"]
    await client.post(p, "/_sim/fault", {"eos": True})
    params = await prefill(client, p, min_tokens=0)
    assert (await client.stats(p))["pinned"] == 0
    await assert_waits(client, fleet["decode-0"], params)
    guarded = await prefill(client, p)
    await client.post(p, "/_sim/fault", {})
    assert await client.text(fleet["decode-0"], BODY, guarded)


async def assert_waits(client: Client, d: SimInstance, params: dict[str, Any]) -> None:
    body = {**BODY, "kv_transfer_params": params}
    waiting = asyncio.ensure_future(client.text(d, body, params))

    async def deferred() -> bool:
        return bool((await client.stats(d))["deferred"])

    await until(deferred)
    assert not waiting.done()
    waiting.cancel()

    async def gone() -> bool:
        return not (await client.stats(d))["deferred"]

    await until(gone)


async def test_d_that_comes_first_is_served(fleet: Fleet, client: Client) -> None:
    p, d = fleet["prefill-0"], fleet["decode-0"]
    name = f"xfer-{uuid.uuid4().hex}"
    params = {
        "do_remote_prefill": True,
        "transfer_id": name,
        "remote_bootstrap_addr": p.url,
        "remote_engine_id": (await engine(client, p))["engine_id"],
    }
    waiting = asyncio.ensure_future(client.text(d, BODY, params))

    async def deferred() -> bool:
        return bool((await client.stats(d))["deferred"])

    await until(deferred)
    send = {"do_remote_decode": True, "transfer_id": name}
    await client.post(p, COMPLETIONS, {**BODY, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": send})
    assert await waiting == await client.text(fleet["decode-1"], BODY)


async def test_a_rejected_decode_releases_the_blocks(fleet: Fleet, client: Client) -> None:
    p, d = fleet["prefill-0"], fleet["decode-0"]
    params = await prefill(client, p)
    await client.post(d, COMPLETIONS, {**BODY, "max_tokens": 5000, "kv_transfer_params": params})
    assert client.status == 400

    async def released() -> bool:
        return (await client.stats(p))["pinned"] == 0

    await until(released)
    assert (await client.stats(p))["hand_offs"]["released"] >= 1


async def test_an_engine_that_is_not_known_fails_the_request(fleet: Fleet, client: Client) -> None:
    params = await prefill(client, fleet["prefill-0"])
    await client.post(
        fleet["decode-0"], COMPLETIONS, {**BODY, "kv_transfer_params": {**params, "remote_engine_id": "x"}}
    )
    assert client.status == 500


@pytest.mark.parametrize("missing", ["transfer_id", "remote_bootstrap_addr", "remote_engine_id"])
async def test_without_one_of_its_parts_d_computes_the_prompt(
    fleet: Fleet, client: Client, missing: str
) -> None:
    params = await prefill(client, fleet["prefill-0"])
    less = {key: value for key, value in params.items() if key != missing}
    assert await client.text(fleet["decode-0"], BODY, less) == await client.text(fleet["decode-0"], BODY)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("prefill-1", {"do_remote_prefill": True, "transfer_id": "x"}),
        ("decode-1", {"do_remote_decode": True, "transfer_id": "x"}),
    ],
)
async def test_parameters_for_the_other_role_end_the_engine(
    fleet: Fleet, client: Client, name: str, params: dict[str, Any]
) -> None:
    await client.post(fleet[name], COMPLETIONS, {**BODY, "kv_transfer_params": params})
    assert client.status == 500
    await until(lambda: not fleet[name].alive)
    assert "AssertionError" in fleet[name].output()
    fleet.restart(name)
