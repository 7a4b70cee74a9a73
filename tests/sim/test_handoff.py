"""A hand-off between two simulated engines, and what goes wrong with one that does not fit."""

import asyncio
import json
from typing import Any

import pytest

from tests.support.sim import BODY, CHAT, COMPLETIONS, HELLO, PROMPT, Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.sim.text import tokenize

KEYS = [
    "do_remote_prefill",
    "do_remote_decode",
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "tp_size",
    "dcp_size",
    "pp_size",
    "remote_num_tokens",
    "remote_blocks_expiry_time",
    "remote_registration_generation",
    "transfer_mode",
    "remote_prefill_cached_tokens",
]


async def test_hand_off_gives_the_same_text(fleet: Fleet, client: Client) -> None:
    p, d = fleet["prefill-0"], fleet["decode-0"]
    body = {"prompt": "New to every cache. " + PROMPT, "max_tokens": 24}
    tokens = len(tokenize(body["prompt"]))
    local = await client.text(fleet["decode-1"], body)
    params = await client.prefill(p, body)
    assert list(params) == KEYS
    assert (params["remote_host"], params["remote_port"]) == (p.host, p.port)
    assert params["remote_num_tokens"] == tokens
    assert (await client.stats(p))["pinned"] == 1
    assert await client.metric(p, "vllm:kv_cache_usage_perc") > 0
    assert await client.metric(p, "vllm:num_requests_running") == 0

    source = 'source="external_kv_transfer"'
    before = await client.metric(d, "vllm:prompt_tokens_by_source_total", source)
    assert await client.text(d, body, params) == local
    after = await client.metric(d, "vllm:prompt_tokens_by_source_total", source)
    assert after - before == tokens
    assert (await client.stats(p))["blocks_used"] == 0
    entry = await client.last(d)
    assert (entry["hand_off"], entry["outcomes"], entry["status"]) == ("receive", ["good"], 200)


async def test_a_prompt_is_computed_and_sent_once(fleet: Fleet, client: Client) -> None:
    p, d = fleet["prefill-0"], fleet["decode-0"]
    body = {"prompt": "Asked twice. " + PROMPT, "max_tokens": 4}
    tokens = len(tokenize(body["prompt"]))
    full = (tokens - 1) // 16 * 16
    for cached in (0, full):
        source = 'source="external_kv_transfer"'
        before = await client.metric(d, "vllm:prompt_tokens_by_source_total", source)
        hits = await client.metric(p, "vllm:prefix_cache_hits_total")
        params = await client.prefill(p, body)
        assert params["remote_prefill_cached_tokens"] == cached
        answer = await client.post(d, COMPLETIONS, {**body, "kv_transfer_params": params})
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
        assert await client.metric(p, "vllm:prefix_cache_hits_total") - hits == cached
        after = await client.metric(d, "vllm:prompt_tokens_by_source_total", source)
        assert after - before == tokens - cached


async def test_hand_off_of_a_chat_stream(fleet: Fleet, client: Client) -> None:
    local = await client.post(fleet["decode-1"], CHAT, HELLO)
    params = await client.prefill(fleet["prefill-1"], HELLO, CHAT)
    body = {**HELLO, "stream": True, "kv_transfer_params": params}
    *events, _ = await client.post(fleet["decode-0"], CHAT, body)
    text = "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events)
    assert text == local["choices"][0]["message"]["content"]


async def test_a_replayed_hand_off_gives_wrong_text(fleet: Fleet, client: Client) -> None:
    params = await client.prefill(fleet["prefill-0"], BODY)
    good = await client.text(fleet["decode-0"], BODY, params)
    assert await client.text(fleet["decode-1"], BODY, params) != good
    assert (await client.last(fleet["decode-1"]))["outcomes"] == ["stale"]


async def test_wrong_blocks_in_range_give_wrong_text(fleet: Fleet, client: Client) -> None:
    params = await client.prefill(fleet["prefill-0"], BODY)
    params["remote_block_ids"] = [[block + 1 for block in params["remote_block_ids"][0]]]
    wrong = await client.text(fleet["decode-0"], BODY, params)
    assert wrong != await client.text(fleet["decode-0"], BODY)


async def test_a_hand_off_of_another_prompt_gives_wrong_text(fleet: Fleet, client: Client) -> None:
    params = await client.prefill(fleet["prefill-0"], {**BODY, "prompt": PROMPT[::-1]})
    assert await client.text(fleet["decode-0"], BODY, params) != await client.text(fleet["decode-0"], BODY)


async def test_a_rejected_decode_releases_the_blocks(fleet: Fleet, client: Client) -> None:
    p, d = fleet["prefill-0"], fleet["decode-0"]
    params = await client.prefill(p, BODY)
    moved = await client.metric(d, "vllm:nixl_bytes_transferred_sum")
    await client.post(d, COMPLETIONS, {**BODY, "max_tokens": 5000, "kv_transfer_params": params})
    assert client.status == 400

    async def released() -> bool:
        return (await client.stats(p))["blocks_used"] == 0

    await until(released)
    assert await client.metric(d, "vllm:nixl_bytes_transferred_sum") == moved


async def test_a_dead_sender_fails_the_request(fleet: Fleet, client: Client) -> None:
    params = await client.prefill(fleet["prefill-1"], BODY)
    fleet.kill("prefill-1")
    try:
        body = {**BODY, "kv_transfer_params": params}
        error = await client.post(fleet["decode-0"], COMPLETIONS, body)
        expected = {
            "message": "Internal server error",
            "type": "InternalServerError",
            "param": None,
            "code": 500,
        }
        assert (client.status, error) == (500, {"error": expected})
        events = await client.post(fleet["decode-0"], COMPLETIONS, {**body, "stream": True})
        assert (client.status, json.loads(events[0]), events[1:]) == (200, {"error": expected}, ["[DONE]"])
        assert await client.metric(fleet["decode-0"], "vllm:nixl_num_failed_transfers_total") == 2
        assert (await client.stats(fleet["decode-0"]))["blocks_used"] == 0
    finally:
        fleet.restart("prefill-1")
    await client.post(fleet["decode-0"], COMPLETIONS, body)
    assert client.status == 500  # another engine lives there now


@pytest.mark.parametrize(
    "change",
    [
        {"remote_block_ids": None},
        {"remote_block_ids": [1, 2, 3]},
        {"remote_block_ids": [["1", "2"]]},
        {"remote_block_ids": [[1]]},
        {"remote_block_ids": [[10**6] * 200]},
    ],
    ids=["none", "flat", "strings", "few", "out-of-range"],
)
async def test_bad_blocks_kill_the_decode_engine(
    fleet: Fleet, client: Client, change: dict[str, Any]
) -> None:
    d = fleet["decode-1"]
    params = await client.prefill(fleet["prefill-0"], BODY)
    try:
        answer = await client.post(d, COMPLETIONS, {**BODY, "kv_transfer_params": {**params, **change}})
        assert (client.status, answer["error"]["type"]) == (500, "InternalServerError")
        assert await asyncio.to_thread(d.process.wait, HUNG_S) == 1
        assert "EngineCore died" in d.output()
    finally:
        fleet.restart("decode-1")


@pytest.mark.parametrize("key", ["remote_request_id", "remote_host"])
async def test_a_hand_off_without_sender_hangs_and_kills_when_the_client_leaves(
    fleet: Fleet, client: Client, key: str
) -> None:
    d = fleet["decode-1"]
    params = await client.prefill(fleet["prefill-0"], BODY)
    del params[key]
    request = asyncio.create_task(client.post(d, COMPLETIONS, {**BODY, "kv_transfer_params": params}))

    async def deferred() -> bool:
        return (await client.stats(d))["deferred"] == 1

    try:
        await until(deferred)
        assert d.alive
        request.cancel()
        assert await asyncio.to_thread(d.process.wait, HUNG_S) == 1
    finally:
        fleet.restart("decode-1")


async def test_several_prompts_give_one_hand_off(fleet: Fleet, client: Client) -> None:
    params = await client.prefill(fleet["prefill-0"], {"prompt": ["one", "two"]})
    assert len(params["remote_block_ids"]) == 1
    await client.text(fleet["decode-0"], {"prompt": "one", "max_tokens": 1}, params)
