"""The simulated engine behind HTTP: what it answers."""

import json
from typing import Any

import pytest

from tests.support.sim import BODY, CHAT, COMPLETIONS, HELLO, PROMPT, SEND, Client
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile
from vllm_pd_scheduler.sim.text import tokenize


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
    assert await client.get(instance, "/version") == {"version": "0.33.0"}
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


async def test_ranks(client: Client) -> None:
    """As measured on vLLM 0.32 with --data-parallel-size 2."""
    with Fleet(1, 1, profile=EngineProfile.instant(), data_parallel_size=2) as fleet:
        prefill, decode = fleet["prefill-0"], fleet["decode-0"]
        body = {"prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": SEND}
        engines = set()
        for rank in ("0", "1", "1"):
            sent = await client.post(prefill, COMPLETIONS, body, **{"X-data-parallel-rank": rank})
            params = sent["kv_transfer_params"]
            assert params["remote_engine_id"].endswith(f"_dp{rank}")
            engines.add(params["remote_engine_id"])
            assert (await client.last(prefill))["rank"] == int(rank)
            whole = {"prompt": PROMPT, "max_tokens": 8}
            assert await client.text(decode, whole, params) == await client.text(decode, whole)
        assert len(engines) == 2
        name = "vllm:request_success_total"
        for rank, count in (("0", 1.0), ("1", 2.0)):
            label = f'engine="{rank}",finished_reason="length"'
            assert await client.metric(prefill, name, label) == count
        for rank in ("2", "-1"):
            refused = await client.post(decode, COMPLETIONS, BODY, **{"X-data-parallel-rank": rank})
            assert client.status == 400
            message = f"data_parallel_rank {rank} is out of range [0, 2)."
            assert refused["error"] == {
                "message": message,
                "type": "BadRequestError",
                "param": None,
                "code": 400,
            }
        for path, header in ((COMPLETIONS, {}), (COMPLETIONS, {"X-data-parallel-rank": "x"})):
            await client.post(decode, path, BODY, **header)
            assert client.status == 200
        await client.post(
            decode, "/v1/responses", {"input": "x", "max_output_tokens": 2}, **{"X-data-parallel-rank": "7"}
        )
        assert client.status == 200, "it reads no rank there"
