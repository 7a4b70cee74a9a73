import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.support.sim import CHAT, COMPLETIONS, PROMPT, Client
from tests.support.sim_fleet import Fleet, SimInstance
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.sim.profile import EngineProfile
from vllm_pd_scheduler.sim.text import tokenize

HELLO = {"messages": [{"role": "user", "content": "Hello there"}]}


@asynccontextmanager
async def fault(client: Client, instance: SimInstance, **fault: Any) -> AsyncIterator[None]:
    await client.post(instance, "/_sim/fault", fault)
    assert client.status == 200
    try:
        yield
    finally:
        await client.post(instance, "/_sim/fault", {})


# -- answers ----------------------------------------------------------------------------------------------


async def test_completion(fleet: Fleet, client: Client) -> None:
    headers = {"X-Request-Id": "abc"}
    answer = await client.post(
        fleet["decode-0"], COMPLETIONS, {"prompt": "12345678", "max_tokens": 5}, **headers
    )
    assert (answer["id"], client.headers["x-request-id"]) == ("cmpl-abc", "abc")
    assert (answer["object"], answer["model"]) == ("text_completion", "sim-model")
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"], len(choice["text"].split())) == (0, "length", 5)
    usage = {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert answer["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["kv_transfer_params"] is None


async def test_streamed_completion_is_the_same_text(fleet: Fleet, client: Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 7}
    whole = await client.text(fleet["decode-0"], body)
    *events, done = await client.post(fleet["decode-1"], COMPLETIONS, {**body, "stream": True})
    assert (client.headers["content-type"], done) == ("text/event-stream; charset=utf-8", "[DONE]")
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole
    assert [choice["finish_reason"] for choice in choices] == [None] * 6 + ["length"]


async def test_streamed_chat(fleet: Fleet, client: Client) -> None:
    whole = await client.post(fleet["decode-0"], CHAT, HELLO)
    assert whole["id"].startswith("chatcmpl-")
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert 20 <= whole["usage"]["completion_tokens"] <= 60
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    *events, usage, done = await client.post(fleet["decode-0"], CHAT, body)
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert (json.loads(usage)["choices"], json.loads(usage)["usage"]) == ([], whole["usage"])
    assert done == "[DONE]"


async def test_several_choices(fleet: Fleet, client: Client) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 4}
    answer = await client.post(fleet["decode-0"], COMPLETIONS, body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][2]["text"] == await client.text(
        fleet["decode-1"], {"prompt": "two", "max_tokens": 4}
    )
    *events, _ = await client.post(fleet["decode-0"], COMPLETIONS, {**body, "stream": True})
    assert {json.loads(event)["choices"][0]["index"] for event in events} == {0, 1, 2, 3}


async def test_lengths(fleet: Fleet, client: Client) -> None:
    async def end(path: str = COMPLETIONS, **body: Any) -> tuple[str, int]:
        answer = await client.post(fleet["decode-0"], path, {"prompt": PROMPT, **body})
        return answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]

    natural = await end()
    assert natural[0] == "stop"
    assert await end(max_tokens=200) == natural
    assert await end(max_tokens=200, ignore_eos=True) == ("length", 200)
    assert await end(min_tokens=90) == ("stop", 90)
    assert await end(CHAT, **HELLO, max_tokens=9, max_completion_tokens=3) == ("length", 3)


async def test_token_ids_are_the_text(fleet: Fleet, client: Client) -> None:
    tokens = (await client.post(fleet["prefill-0"], "/tokenize", {"prompt": PROMPT}))["tokens"]
    assert tokens == tokenize(PROMPT)
    by_ids = await client.text(fleet["decode-0"], {"prompt": tokens, "max_tokens": 5})
    assert by_ids == await client.text(fleet["decode-0"], {"prompt": PROMPT, "max_tokens": 5})


@pytest.mark.parametrize(
    ("path", "body", "status", "type", "param"),
    [
        (COMPLETIONS, {"prompt": "x" * 20000}, 400, "BadRequestError", "input_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 4096}, 400, "BadRequestError", "input_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "NotFoundError", "model"),
        (COMPLETIONS, {"prompt": "x", "n": 5_000_000}, 400, "BadRequestError", "n"),
        (COMPLETIONS, {"prompt": []}, 400, "BadRequestError", "prompt"),
        (COMPLETIONS, {}, 400, "Bad Request", "prompt"),
        (COMPLETIONS, {"prompt": 3}, 400, "Bad Request", "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "many"}, 400, "Bad Request", "max_tokens"),
        (COMPLETIONS, b"{", 400, "Bad Request", None),
        (COMPLETIONS, b"\xff\xfe", 400, "Bad Request", None),
        (CHAT, {"messages": []}, 400, "BadRequestError", "messages"),
        (CHAT, {"prompt": "x"}, 400, "Bad Request", "messages"),
    ],
)
async def test_rejections(
    fleet: Fleet, client: Client, path: str, body: Any, status: int, type: str, param: str | None
) -> None:
    answer = await client.post(fleet["decode-0"], path, body)
    error = answer["error"]
    assert (client.status, error["code"], error["type"], error["param"]) == (status, status, type, param)
    assert error["message"]


async def test_other_routes(fleet: Fleet, client: Client) -> None:
    instance = fleet["decode-0"]
    for path in ("/health", "/ping"):
        assert (await client.get(instance, path), client.status) == ("", 200)
    assert await client.get(instance, "/version") == {"version": "0.32.0"}
    assert await client.get(instance, "/load") == {"server_load": 0}
    (card,) = (await client.get(instance, "/v1/models"))["data"]
    assert (card["id"], card["max_model_len"]) == ("sim-model", 4096)
    answer = await client.post(instance, "/v1/embeddings", {"input": ["a", "b"]})
    one, two = (item["embedding"] for item in answer["data"])
    assert one != two
    assert (await client.get(instance, "/nowhere"), client.status) == ({"detail": "Not Found"}, 404)
    assert (await client.get(instance, COMPLETIONS), client.status) == ({"detail": "Method Not Allowed"}, 405)


async def test_a_body_of_many_megabytes_is_read(fleet: Fleet, client: Client) -> None:
    answer = await client.post(fleet["decode-0"], COMPLETIONS, {"prompt": "x" * 20_000_000})
    assert (client.status, answer["error"]["param"]) == (400, "input_tokens")
    assert (await client.last(fleet["decode-0"]))["body_bytes"] > 20_000_000


# -- hand-off ---------------------------------------------------------------------------------------------

BODY = {"prompt": PROMPT, "max_tokens": 24}
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


# -- leases, aborts, load: an engine that takes its time --------------------------------------------------


@pytest.fixture(scope="module")
def slow() -> Any:
    """Transfers never end here, nor do leases."""
    profile = EngineProfile(decode_base=0.05, transfer_latency=600, lease=600, num_blocks=64)
    with Fleet(profile=profile) as running:
        yield running


@pytest.fixture(scope="module")
def short_lease() -> Any:
    decode = ["--load-fail-policy=recompute", "--load-fail-delay=0"]
    with Fleet(profile=EngineProfile(lease=0.1), decode_arguments=decode) as running:
        yield running


async def test_an_expired_lease_gives_wrong_text(short_lease: Fleet, client: Client) -> None:
    p = short_lease["prefill-0"]
    params = await client.prefill(p, BODY)

    async def expired() -> bool:
        return (await client.stats(p))["pinned"] == 0

    await until(expired)
    assert await client.metric(p, "vllm:nixl_num_kv_expired_reqs_total") == 1
    body = {**BODY, "max_tokens": 2}
    assert await client.text(short_lease["decode-0"], body, params) != await client.text(p, body)


async def test_recompute_when_the_sender_is_unknown(short_lease: Fleet, client: Client) -> None:
    p, d = short_lease["prefill-0"], short_lease["decode-0"]
    params = await client.prefill(p, BODY)
    params["remote_port"] = 1
    body = {**BODY, "max_tokens": 2}
    assert await client.text(d, body, params) == await client.text(p, body)
    assert (await client.last(d))["outcomes"] == ["recomputed"]


async def test_a_client_that_leaves_frees_all(slow: Fleet, client: Client) -> None:
    p, d = slow["prefill-0"], slow["decode-0"]
    params = await client.prefill(p, BODY)
    body = {**BODY, "kv_transfer_params": params}
    request = asyncio.create_task(client.post(d, COMPLETIONS, body))

    async def deferred() -> bool:
        return await client.metric(d, "vllm:num_requests_waiting_by_reason", 'reason="deferred"') == 1

    async def free() -> bool:
        return all([(await client.stats(each))["blocks_used"] == 0 for each in (p, d)])

    await until(deferred)
    request.cancel()
    await until(free)
    assert (await client.stats(p))["hand_offs"]["released"] == 1
    assert await client.metric(d, "vllm:request_success_total", 'finished_reason="abort"') == 1


async def test_requests_wait_for_room(slow: Fleet, client: Client) -> None:
    d = slow["decode-0"]

    def ask(name: str, max_tokens: int) -> asyncio.Task[str]:
        body = {"prompt": name * 4 * 700, "max_tokens": max_tokens, "ignore_eos": True}
        return asyncio.create_task(Client(client.session).text(d, body))

    async def running() -> bool:
        return await client.metric(d, "vllm:num_requests_running") == 1

    async def waiting() -> bool:
        return await client.metric(d, "vllm:num_requests_waiting_by_reason", 'reason="capacity"') == 2

    first = ask("x", 300)
    await until(running)
    others = [ask(name, 4) for name in "yz"]
    await until(waiting)
    assert await client.metric(d, "vllm:kv_cache_usage_perc") > 0.6
    assert await client.get(d, "/load") == {"server_load": 3}
    assert not first.done()
    first.cancel()
    assert len(set(await asyncio.gather(*others))) == 2


async def test_sigterm_ends_a_busy_server_at_once(slow: Fleet, client: Client) -> None:
    p = slow["prefill-0"]
    request = asyncio.create_task(
        client.post(p, COMPLETIONS, {**BODY, "max_tokens": 500, "ignore_eos": True})
    )

    async def running() -> bool:
        return (await client.stats(p))["running"] == 1

    await until(running)
    slow.kill("prefill-0", signal.SIGTERM)
    assert await asyncio.to_thread(p.process.wait, HUNG_S) == 0
    with pytest.raises(aiohttp.ClientError):  # cut, not waited for
        await request
    assert "Traceback" not in p.output()
    slow.restart("prefill-0")


async def test_api_key_and_no_connector(client: Client) -> None:
    arguments = ["--api-key=secret", "--kv-connector=none", "--instant"]
    with Fleet(1, 0, arguments=arguments) as fleet:
        p = fleet["prefill-0"]
        answer = await client.post(p, COMPLETIONS, BODY)
        assert (client.status, answer) == (401, {"error": "Unauthorized"})
        for path in ("/health", "/metrics", "/version", "/load", "/ping"):
            await client.get(p, path)
            assert client.status == 200
        params = {"kv_transfer_params": {"do_remote_prefill": True}}
        answer = await client.post(p, COMPLETIONS, {**BODY, **params}, Authorization="Bearer secret")
        assert (client.status, answer["kv_transfer_params"]) == (200, None)


async def test_an_engine_that_returns_under_its_old_id_is_not_recognised(client: Client) -> None:
    arguments = ["--instant", "--load-fail-delay=0"]
    with Fleet(1, 1, arguments=arguments, prefill_arguments=["--engine-id=fixed"]) as fleet:
        p, d = fleet.instances
        good = await client.text(d, BODY, await client.prefill(p, BODY))
        await asyncio.to_thread(fleet.restart, "prefill-0")
        params = await client.prefill(p, BODY)
        await client.post(d, COMPLETIONS, {**BODY, "kv_transfer_params": params})
        assert client.status == 500
        assert await client.text(p, BODY) == good
        assert [each.output().count("\n") for each in (p, d)] == [2, 1]  # one line a start, and nothing else


# -- faults -----------------------------------------------------------------------------------------------


async def test_fault_status(fleet: Fleet, client: Client) -> None:
    d = fleet["decode-0"]
    async with fault(client, d, status=503, times=1):
        answer = await client.post(d, COMPLETIONS, BODY)
        assert (client.status, answer["error"]["code"]) == (503, 503)
        await client.text(d, BODY)


async def test_fault_delay_and_health(fleet: Fleet, client: Client) -> None:
    d = fleet["decode-0"]
    async with fault(client, d, delay=30, health=500):
        await client.get(d, "/health")
        assert client.status == 500
        before = len(await client.get(d, "/_sim/requests"))
        request = asyncio.create_task(Client(client.session).text(d, BODY))

        async def received() -> bool:
            return len(await client.get(d, "/_sim/requests")) > before

        await until(received)
        assert (await client.stats(d))["running"] == 0
        request.cancel()
    await client.get(d, "/health")
    assert client.status == 200


async def test_fault_reset(fleet: Fleet, client: Client) -> None:
    d = fleet["decode-0"]
    async with fault(client, d, reset=True):
        with pytest.raises((aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)):
            await client.post(d, COMPLETIONS, BODY)


@pytest.mark.parametrize("stream", [False, True])
async def test_fault_half(fleet: Fleet, client: Client, stream: bool) -> None:
    d = fleet["decode-0"]
    post = client.session.post(d.url + COMPLETIONS, json={**BODY, "stream": stream})
    async with fault(client, d, half=True), post as response:
        assert response.status == 200
        assert await response.content.readany()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()

    async def rest() -> bool:
        return (await client.stats(d))["running"] == 0

    await until(rest)


async def test_an_unknown_fault_is_refused(fleet: Fleet, client: Client) -> None:
    await client.post(fleet["decode-0"], "/_sim/fault", {"statsu": 1})
    assert client.status == 400


async def test_the_journal_holds_requests_as_they_came(fleet: Fleet, client: Client) -> None:
    await client.post(fleet["decode-0"], COMPLETIONS, {"prompt": "你好", "max_tokens": 1}, X_Mark="7")
    entry = await client.last(fleet["decode-0"])
    assert (entry["method"], entry["path"], entry["headers"]["X_Mark"]) == ("POST", COMPLETIONS, "7")
    assert json.loads(entry["body"])["prompt"] == "你好"
    await client.get(fleet["decode-0"], "/health")
    assert await client.last(fleet["decode-0"]) == entry
