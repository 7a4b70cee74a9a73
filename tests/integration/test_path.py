"""Client → Envoy → prefill → decode, on real processes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support.processes import Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

PROMPT = "Prefill reads the whole prompt, decode writes token after token. " * 4
COMPLETION = ("/v1/completions", {"prompt": PROMPT, "max_tokens": 12})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12})


async def without_us(client: Client, path: str, body: dict[str, Any]) -> str:
    """The text that an instance gives alone."""
    url = client.fleet.decode[0].url + path
    async with client.session.post(url, json=body) as response:
        choice = (await response.json())["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT], ids=["completion", "chat"])
async def test_the_text_is_that_of_one_instance(client: Client, path: str, body: Any, stream: bool) -> None:
    expected = await without_us(client, path, body)
    answer = await client.post(path, {**body, "stream": stream})
    assert answer.text == expected
    prefill, decode = answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]
    assert prefill.startswith("prefill-")
    assert decode.startswith("decode-")
    at_p, at_d = (await client.seen(prefill))[-1], (await client.seen(decode))[-1]
    assert at_p["hand_off"] == "send"
    assert (at_d["hand_off"], at_d["outcomes"]) == ("receive", ["good"])
    sent = json.loads(at_p["body"])
    assert (sent["max_tokens"], sent["stream"]) == (1, False)
    got = json.loads(at_d["body"])
    del got["kv_transfer_params"]
    assert got == {**body, "stream": stream}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_long_chat_is_tokenized_once(client: Client, stream: bool) -> None:
    """From P's second answer on; what is no text goes to D for its own eyes."""
    text = {"type": "text", "text": PROMPT * 10}
    chat = {"messages": [{"role": "user", "content": PROMPT * 10}], "max_tokens": 12}
    expected = await without_us(client, CHAT[0], chat)
    for _ in client.fleet.prefill:
        await client.post(*CHAT)
    answer = await client.post(CHAT[0], {**chat, "stream": stream})
    assert answer.text == expected
    seen = await client.request_of(answer)
    got = json.loads(seen["body"])
    assert len(got["kv_transfer_params"].pop("prompt_token_ids")) > 500
    assert seen["outcomes"] == ["good"]
    assert "return_token_ids" not in got
    for messages in (
        [{"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": "data:,x"}}]}],
        CHAT[1]["messages"],
    ):
        answer = await client.post(CHAT[0], {**chat, "messages": messages, "stream": stream})
        sent = json.loads((await client.request_of(answer))["body"])
        assert "prompt_token_ids" not in sent["kv_transfer_params"]


async def test_both_roles_share_the_load(client: Client) -> None:
    answers = [await client.complete() for _ in range(8)]
    assert {a.headers["x-pd-prefill"] for a in answers} == {"prefill-0", "prefill-1"}
    assert {a.headers["x-pd-decode"] for a in answers} == {"decode-0", "decode-1"}


@pytest.mark.parametrize(
    "extra",
    [{"n": 2}, {"prompt": ["one", "two"]}, {"prompt": [[1, 2], [3, 4]]}],
    ids=["n", "several prompts", "several token lists"],
)
async def test_what_cannot_be_split_goes_whole_to_decode(client: Client, extra: dict[str, Any]) -> None:
    answer = await client.complete(**extra)
    assert answer.status == 200
    assert len(answer.json["choices"]) == 2
    assert "x-pd-prefill" not in answer.headers
    assert (await client.seen(answer.headers["x-pd-decode"]))[-1]["hand_off"] is None


async def test_a_prompt_of_token_ids_is_split(client: Client) -> None:
    answer = await client.complete(prompt=[5, 6, 7])
    assert answer.headers["x-pd-prefill"]
    assert (await client.seen(answer.headers["x-pd-decode"]))[-1]["outcomes"] == ["good"]


async def test_headers_reach_both_legs(client: Client) -> None:
    headers = {
        "x-request-id": "req-17",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "authorization": "Bearer of-the-client",
    }
    for _ in client.fleet.prefill:  # the first request to each has an id of the scheduler's
        await client.complete()
    answer = await client.post("/v1/completions", {"prompt": "p", "max_tokens": 2}, headers)
    for name in (answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]):
        seen = {key.lower(): value for key, value in (await client.seen(name))[-1]["headers"].items()}
        assert {key: seen[key] for key in headers} == headers
    assert answer.headers["x-request-id"] == "req-17"
    assert answer.json["id"].startswith("cmpl-req-17")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("POST", "/tokenize", b'{"prompt" : "some text"}'),
        ("POST", "/v1/embeddings", b'{ "input":"some text",  "unknown": 1e3 }'),
        ("GET", "/version", None),
    ],
)
async def test_other_paths_pass_untouched(client: Client, method: str, path: str, body: bytes | None) -> None:
    answer = await client.send(method, path, body)
    assert answer.status == 200
    assert "x-pd-prefill" not in answer.headers
    seen = (await client.seen(answer.headers["x-pd-decode"]))[-1]
    assert (seen["method"], seen["path"]) == (method, path)
    assert seen["body"] == (body or b"").decode()


async def test_errors_of_an_instance_on_other_paths_pass(client: Client) -> None:
    answer = await client.send("GET", "/v1/responses/resp_0")
    assert (answer.status, answer.json) == (404, {"detail": "Not Found"})
    assert (await client.send("GET", "/v1/completions")).status == 405


async def test_unknown_fields_pass_unchanged(client: Client) -> None:
    body = b'{"prompt":"p", "max_tokens" :2,"x_new":{"a":[1.50,1e2,18446744073709551617]},  "y":"\\u00e9"}'
    answer = await client.post("/v1/completions", body)
    assert answer.status == 200
    sent = (await client.seen(answer.headers["x-pd-decode"]))[-1]["body"]
    assert sent.startswith(body[:-1].decode() + ',"kv_transfer_params":')
    leg = (await client.seen(answer.headers["x-pd-prefill"]))[-1]["body"]
    assert '"x_new":{"a":[1.50,1e2,18446744073709551617]}' in leg


@pytest.mark.parametrize("mebibytes", [1, 10, 60])
async def test_large_bodies(client: Client, mebibytes: int) -> None:
    body = b'{"prompt":"p","max_tokens":2,"padding":"' + b"x" * (mebibytes << 20) + b'"}'
    answer = await client.post("/v1/completions", body)
    assert answer.status == 200
    assert answer.headers["x-pd-prefill"]


# -- clients never steer

EVIL = {"do_remote_prefill": True, "remote_engine_id": "evil", "remote_block_ids": [[1]]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", json.dumps({"prompt": "p", "max_tokens": 2, "kv_transfer_params": EVIL})),
        ("/v1/completions", json.dumps({"prompt": "p", "n": 2, "max_tokens": 2, "kv_transfer_params": EVIL})),
        (
            "/v1/completions",
            '{"kv_transfer_params":{"evil":1},"prompt":"p","max_tokens":2,"kv_transfer_params":{"evil":2}}',
        ),
        ("/v1/completions", '{"prompt":"p","n":2,"max_tokens":2,"kv_transfer_param\\u0073":{"evil":1}}'),
        ("/v1/completions", '{"prompt":"p","max_tokens":2,"x":[{"kv\\u005Ftransfer_params":{"evil":1}}]}'),
        ("/v1/embeddings", json.dumps({"input": "x", "kv_transfer_params": EVIL})),
        ("/v1/completions/", json.dumps({"prompt": "p", "kv_transfer_params": EVIL})),
        ("//v1/completions", json.dumps({"prompt": "p", "kv_transfer_params": EVIL})),
        ("/v1/completions?a=b", json.dumps({"prompt": "p", "max_tokens": 2, "kv_transfer_params": EVIL})),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
async def test_a_clients_hand_off_never_gets_through(
    client: Client, method: str, path: str, body: str
) -> None:
    before = await client.seen_by_all()
    await client.send(method, path, body.encode())
    for instance in client.fleet.instances:
        for seen in await client.seen_since(instance.id, before[instance.id]):
            assert "evil" not in seen["body"]
            ours = seen["hand_off"] or "released" in seen["outcomes"]
            assert "remote_block_ids" not in seen["body"] or ours


async def test_steering_headers_never_get_through(client: Client) -> None:
    target = client.fleet["decode-1"]
    evil = {
        "x-gateway-destination-endpoint": f"127.0.0.1:{target.port}",
        "X-Gateway-Destination-Endpoint-Subset": "evil",
        "x-pd-prefill": "evil",
        "X-PD-Anything": "evil",
        "X-data-parallel-rank": "evil",
    }
    used = set()
    for path, body in [("/v1/completions", {"prompt": "p", "max_tokens": 2}), ("/tokenize", {"prompt": "p"})]:
        for _ in range(4):
            answer = await client.post(path, body, evil)
            assert answer.status == 200
            used.add(answer.headers["x-pd-decode"])
            assert answer.headers.get("x-pd-prefill") != "evil"
            assert "evil" not in str((await client.seen(answer.headers["x-pd-decode"]))[-1]["headers"])
    assert used == {"decode-0", "decode-1"}


# -- clients that leave


async def test_a_client_that_leaves_during_prefill_cancels_it(client: Client, fleet: Fleet) -> None:
    for instance in fleet.prefill:
        await client.fault(instance.id, delay=30)
    request = asyncio.ensure_future(client.complete())
    await client.until_in_flight(1)
    request.cancel()
    await client.until_in_flight(0)
    answers = await client.admin("GET", "/metrics")
    assert 'pd_scheduler_requests_rejected_total{reason="prefill' not in answers[1]


async def test_what_a_prefill_leaves_whose_client_has_left_is_freed(client: Client, fleet: Fleet) -> None:
    """An abort may come just after P has finished and pinned its blocks: its answer is waited for."""
    for instance in fleet.prefill:
        await client.fault(instance.id, delay=0.3)

    async def left_in_time() -> bool:
        """If the machine is so busy that P has answered before, D has had the hand-off."""
        before = await client.seen_by_all(releases=True)
        request = asyncio.ensure_future(client.complete())
        await client.until_in_flight(1)
        request.cancel()
        found: list[str] = []

        async def used() -> bool:
            seen = [e for one in fleet.decode for e in await client.seen_since(one.id, before[one.id], True)]
            found[:] = [outcome for each in seen for outcome in each["outcomes"]]
            return bool(found)

        await until(used)
        return found == ["released"]

    await until(left_in_time)


async def test_a_hand_off_that_decode_had_not_begun_with_is_freed(client: Client, fleet: Fleet) -> None:
    for instance in fleet.decode:
        await client.fault(instance.id, delay=30)  # and then it would begin
    before = await client.seen_by_all(releases=True)
    request = asyncio.ensure_future(client.complete())

    async def forwarded() -> bool:
        return any([await client.seen_since(one.id, before[one.id]) for one in fleet.decode])

    await until(forwarded)
    request.cancel()
    for instance in fleet.decode:
        await client.fault(instance.id)

    async def released() -> bool:
        seen = [e for one in fleet.decode for e in await client.seen_since(one.id, before[one.id], True)]
        return ["released"] in [each["outcomes"] for each in seen]

    await until(released)


async def test_in_flight_counts_streams_until_they_end(client: Client) -> None:
    async with client.held_stream() as stream:
        await client.until_in_flight(1)
        assert (await client.instance(stream.headers["x-pd-decode"]))["in_flight"] == 1
    # the block's end closes the connection in mid-stream
    await client.until_in_flight(0)
