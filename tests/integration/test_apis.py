"""Every API that generates is split as completions are, and a D that fails is replaced in the same way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.processes import Answer, Client
from tests.support.waiting import until
from vllm_pd_scheduler.sim.text import tokenize

PROMPT = "Whichever way it is asked, the answer is the same. " * 8
SAID = [{"role": "user", "content": PROMPT}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 12, "instructions": "Be brief."},
    "/v1/messages": {"messages": SAID, "max_tokens": 12, "system": "Be brief."},
    "/inference/v1/generate": {"token_ids": tokenize(PROMPT), "sampling_params": {"max_tokens": 12}},
}
PATHS = ["/v1/responses", "/v1/messages"]


def said(answer: Answer) -> str:
    """The text of an answer, streamed or not."""
    assert answer.status == 200, answer
    if answer.headers["content-type"].startswith("text/event-stream"):
        lines = [
            line.partition("data: ")[2] for line in answer.body.decode().splitlines() if "data: " in line
        ]
        events = [json.loads(line) for line in lines]
        deltas = [event.get("delta") for event in events]
        return "".join(d if isinstance(d, str) else (d or {}).get("text", "") for d in deltas)
    parts = answer.json["output"][0]["content"] if "output" in answer.json else answer.json["content"]
    return "".join(part["text"] for part in parts)


async def undivided(client: Client, path: str) -> Answer:
    """What one instance answers by itself."""
    url = client.fleet["decode-1"].url + path
    async with client.session.post(url, json=REQUESTS[path]) as response:
        return Answer(response.status, {"content-type": "application/json"}, await response.read())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
async def test_it_is_split_and_says_the_same(client: Client, path: str, stream: bool) -> None:
    expected = said(await undivided(client, path))

    async def split() -> bool:
        answer = await client.post(path, {**REQUESTS[path], "stream": stream})
        assert said(answer) == expected
        seen = await client.request_of(answer)
        return "x-pd-prefill" in answer.headers and seen["outcomes"] == ["good"]

    await until(split)


@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}], ids=["500", "reset"])
@pytest.mark.parametrize("path", PATHS)
async def test_another_d_answers(client: Client, path: str, fault: dict[str, Any]) -> None:
    expected = said(await undivided(client, path))
    await client.fault("decode-0", paths=[path], **fault)
    for _ in range(4):
        answer = await client.post(path, REQUESTS[path])
        assert said(answer) == expected
        assert answer.headers["x-pd-decode"] == "decode-1"
        seen = await client.request_of(answer)
        if "x-pd-prefill" not in answer.headers:
            assert json.loads(seen["body"]) == REQUESTS[path], "the client's own"


async def test_usage_is_that_of_an_undivided_engine(client: Client) -> None:
    for path in PATHS:
        own = (await undivided(client, path)).json["usage"]
        usage = (await client.post(path, REQUESTS[path])).json["usage"]
        for each in (own, usage):
            each["input_tokens"] += each.pop("cache_read_input_tokens", 0)
        for key in ("input_tokens", "output_tokens"):
            assert usage[key] == own[key]


async def test_a_path_that_is_not_public_is_not_split(client: Client) -> None:
    answer = await client.post("/inference/v1/generate", REQUESTS["/inference/v1/generate"])
    assert (answer.status, answer.headers["x-pd-reason"]) == (404, "not_public")


async def test_a_hand_off_of_the_clients_own_is_cut_out(client: Client) -> None:
    for path in PATHS:
        body = {**REQUESTS[path], "kv_transfer_params": {"do_remote_prefill": True}}
        answer = await client.post(path, body)
        assert answer.status == 200
        sent = json.loads((await client.request_of(answer))["body"])
        assert sent.get("kv_transfer_params", {}).get("remote_engine_id", "ours") != ""
        assert sent.get("kv_transfer_params") != {"do_remote_prefill": True}


async def test_a_response_is_asked_for_where_it_is_kept(client: Client) -> None:
    for _ in range(4):
        answer = await client.post("/v1/responses", REQUESTS["/v1/responses"])
        name = answer.json["id"]
        assert name.startswith("resp_pd")
        again = {"input": "and?", "previous_response_id": name}
        following = await client.post("/v1/responses", again)
        assert following.status == 404, "the simulator keeps none"
        assert following.headers["x-pd-decode"] == answer.headers["x-pd-decode"]
