"""Ascend's Mooncake between simulated engines: its keys, what D dies of, and a prefill that stops."""

from collections.abc import Iterator

import pytest

from tests.support.sim import BODY, COMPLETIONS, SEND, Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

KEYS = [
    "do_remote_prefill",
    "do_remote_decode",
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "remote_pcp_size",
    "remote_dcp_size",
    "remote_ptp_size",
    "last_token_id",
    "remote_multi_nodes_meta_mapping",
    "num_prompt_blocks",
    "remote_block_size",
]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 2, profile=EngineProfile.instant(), connector="ascend-mooncake") as running:
        yield running


async def test_hand_off_gives_the_same_text(fleet: Fleet, client: Client) -> None:
    local = await client.text(fleet["decode-1"], BODY)
    params = await client.prefill(fleet["prefill-0"], BODY)
    assert list(params) == KEYS
    assert await client.text(fleet["decode-0"], BODY, params) == local
    assert await client.text(fleet["decode-0"], BODY, params) != local, "a second time"


async def test_after_a_stop_there_is_none(fleet: Fleet, client: Client) -> None:
    p = fleet["prefill-0"]
    await client.post(p, "/_sim/fault", {"eos": True})
    assert await client.prefill(p, BODY) is None
    assert (await client.stats(p))["pinned"] == 0
    body = {**BODY, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": SEND}
    assert (await client.post(p, COMPLETIONS, body))["kv_transfer_params"] is not None
    await client.post(p, "/_sim/fault", {})


@pytest.mark.parametrize("key", ["remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host"])
async def test_what_is_missing_ends_d(fleet: Fleet, client: Client, key: str) -> None:
    params = await client.prefill(fleet["prefill-0"], BODY)
    del params[key]
    await client.post(fleet["decode-1"], COMPLETIONS, {**BODY, "kv_transfer_params": params})
    assert client.status == 500
    await until(lambda: not fleet["decode-1"].alive)
    fleet.restart("decode-1")
