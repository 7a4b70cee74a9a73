"""MoRI-IO between simulated engines: blocks that D reads, and blocks that P writes to the D that it knows."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.sim import BODY, COMPLETIONS, Client
from tests.support.sim_fleet import Fleet, SimInstance
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

KEYS = [
    "do_remote_prefill",
    "do_remote_decode",
    "remote_block_ids",
    "remote_engine_id",
    "remote_host",
    "remote_handshake_port",
    "remote_notify_port",
    "remote_dp_rank",
    "remote_dp_rank_override",
    "remote_dp_size",
    "remote_dp_size_local",
    "tp_size",
    "transfer_id",
    "remote_prefill_cached_tokens",
]


@pytest.fixture(scope="module", params=["moriio-read", "moriio-write"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    arguments = ["--load-fail-delay=0.02"]
    profile = EngineProfile.instant()
    with Fleet(1, 2, profile=profile, arguments=arguments, connector=request.param) as running:
        yield running


async def prefill(client: Client, fleet: Fleet, to: SimInstance, **more: Any) -> Any:
    params: dict[str, Any] = {"do_remote_decode": True, "transfer_id": f"tx-{uuid.uuid4().hex}"}
    if fleet.connector == "moriio-write":
        params |= {"remote_host": to.host, "remote_handshake_port": to.port, "remote_notify_port": to.port}
    body = {**BODY, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": params, **more}
    found = (await client.post(fleet["prefill-0"], COMPLETIONS, body))["kv_transfer_params"]
    assert found is None or found["transfer_id"] == params["transfer_id"]
    return found


async def test_hand_off_gives_the_same_text(fleet: Fleet, client: Client) -> None:
    d = fleet["decode-0"]
    local = await client.text(fleet["decode-1"], BODY)
    params = await prefill(client, fleet, d)
    assert list(params) == KEYS
    assert await client.text(d, BODY, params) == local
    assert (await client.last(d))["outcomes"] == ["good"]
    assert (await client.stats(fleet["prefill-0"]))["pinned"] == 0


async def test_another_d(fleet: Fleet, client: Client) -> None:
    """It can read what is there, and is sent nothing that P writes elsewhere."""
    params = await prefill(client, fleet, fleet["decode-0"])
    body = {**BODY, "kv_transfer_params": params}
    await client.post(fleet["decode-1"], COMPLETIONS, body)
    assert client.status == (200 if fleet.connector == "moriio-read" else 500)


async def test_a_rejected_decode_releases_the_blocks(fleet: Fleet, client: Client) -> None:
    params = await prefill(client, fleet, fleet["decode-0"])
    await client.post(
        fleet["decode-1"], COMPLETIONS, {**BODY, "max_tokens": 10**6, "kv_transfer_params": params}
    )
    assert client.status == 400

    async def released() -> bool:
        return (await client.stats(fleet["prefill-0"]))["pinned"] == 0

    await until(released)


async def test_after_a_stop_there_is_none(fleet: Fleet, client: Client) -> None:
    p = fleet["prefill-0"]
    await client.post(p, "/_sim/fault", {"eos": True})
    assert await prefill(client, fleet, fleet["decode-0"], min_tokens=0) is None
    assert await prefill(client, fleet, fleet["decode-0"]) is not None
    await client.post(p, "/_sim/fault", {})


async def test_an_address_that_is_missing_ends_the_engine_that_writes(fleet: Fleet, client: Client) -> None:
    params = {"do_remote_decode": True, "transfer_id": "x"}
    await client.post(fleet["prefill-0"], COMPLETIONS, {**BODY, "kv_transfer_params": params})
    if fleet.connector == "moriio-write":
        await until(lambda: not fleet["prefill-0"].alive)
        fleet.restart("prefill-0")
    assert fleet["prefill-0"].alive
