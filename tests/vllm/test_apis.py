"""The APIs on a real vLLM pair: the whole answer equals that of one engine alone, field by field.

The engine alone is D, which gets the request without P. Before each request the caches of both are emptied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import Stack, spawned
from tests.support.real_vllm import MODEL, Instance, Pair, post, ready
from tests.support.vllm_answers import answered, comparable, found
from tests.support.waiting import until

pytestmark = pytest.mark.vllm

EOS = "2"
COMPLETIONS, CHAT, RESPONSES, MESSAGES, GENERATE = PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/inference/v1/generate",
)
TEXT = "Whatever it is called, an answer is an answer, and it says so at some length. " * 12
SAID = [{"role": "user", "content": TEXT}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sky": {"enum": ["clear", "cloudy"]}, "wind": {"type": "boolean"}},
    "required": ["sky", "wind"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Say how it is.", "parameters": SCHEMA, "strict": True}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
ITEM_TOOLS = {"tools": [{"type": "function", **FUNCTION}]}
MESSAGE_TOOLS = {
    "tools": [{"name": "weather", "description": "Say how it is.", "input_schema": SCHEMA, "strict": True}]
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
IDS = [(number * 7 + 11) % 900 + 20 for number in range(300)]
LONG = 300
CACHED = ("cached_tokens", "cache_read_input_tokens")
COUNTED = {"stream_options": {"include_usage": True}}
"""Only for a stream."""

Row = tuple[str, dict[str, Any], str]
"""The path, the request, and why its answer ends."""
REQUESTS: dict[str, Row] = {
    "completion": (COMPLETIONS, {"prompt": TEXT, "max_tokens": 8, "logprobs": 2}, "length"),
    "min_tokens": (COMPLETIONS, {"prompt": TEXT, "max_tokens": 9, "min_tokens": 9}, "length"),
    "one token": (COMPLETIONS, {"prompt": TEXT, "max_tokens": 1, "logprobs": 0}, "length"),
    "stop string": (COMPLETIONS, {"prompt": TEXT, "max_tokens": LONG, "stop": ["e"]}, "stop"),
    "stop string kept": (
        COMPLETIONS,
        {"prompt": TEXT, "max_tokens": LONG, "stop": ["e"], "include_stop_str_in_output": True},
        "stop",
    ),
    "stop token": (
        COMPLETIONS,
        {
            "prompt": TEXT,
            "max_tokens": LONG,
            "stop_token_ids": [50],
            "min_tokens": 3,
            "logit_bias": {"50": 100},
        },
        "stop",
    ),
    "first token a stop": (
        COMPLETIONS,
        {"prompt": TEXT, "max_tokens": LONG, "stop_token_ids": [50], "logit_bias": {"50": 100}},
        "stop",
    ),
    "eos": (
        COMPLETIONS,
        {"prompt": TEXT, "max_tokens": LONG, "min_tokens": 4, "logit_bias": {EOS: 100}},
        "stop",
    ),
    "first token eos": (COMPLETIONS, {"prompt": TEXT, "max_tokens": 8, "logit_bias": {EOS: 100}}, "stop"),
    "token ids": (COMPLETIONS, {"prompt": IDS, "max_tokens": 8, "return_token_ids": True}, "length"),
    "penalties": (
        COMPLETIONS,
        {"prompt": TEXT, "max_tokens": 24, "presence_penalty": 1.5, "repetition_penalty": 1.3, "logprobs": 1},
        "length",
    ),
    "seeded": (
        COMPLETIONS,
        {"prompt": TEXT, "max_tokens": 1, "temperature": 1.0, "seed": 7, "top_k": 40},
        "length",
    ),
    "regex": (
        COMPLETIONS,
        {"prompt": TEXT, "max_tokens": LONG, "structured_outputs": {"regex": "[ab]{3}-[0-9]{4}"}},
        "stop",
    ),
    "completion format": (
        COMPLETIONS,
        {"prompt": TEXT, "max_tokens": LONG, "response_format": FORMAT},
        "stop",
    ),
    "chat": (CHAT, {"messages": SAID, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}, "length"),
    "chat limit": (CHAT, {"messages": SAID, "max_completion_tokens": 6, "return_token_ids": True}, "length"),
    "chat stop": (CHAT, {"messages": SAID, "max_tokens": LONG, "stop": "e"}, "stop"),
    "chat eos": (
        CHAT,
        {"messages": SAID, "max_tokens": 8, "min_tokens": 3, "logit_bias": {EOS: 100}},
        "stop",
    ),
    "chat first eos": (CHAT, {"messages": SAID, "max_tokens": 8, "logit_bias": {EOS: 100}}, "stop"),
    "choice": (
        CHAT,
        {"messages": SAID, "max_tokens": LONG, "structured_outputs": {"choice": ["a storm", "a breeze"]}},
        "stop",
    ),
    "format": (
        CHAT,
        {"messages": SAID, "max_tokens": LONG, "response_format": FORMAT, "logprobs": True},
        "stop",
    ),
    "tools none": (CHAT, {"messages": SAID, "max_tokens": 8, **TOOLS, "tool_choice": "none"}, "length"),
    "tools auto": (CHAT, {"messages": SAID, "max_tokens": 8, **TOOLS}, "length"),
    "tool required": (
        CHAT,
        {"messages": SAID, "max_tokens": LONG, **TOOLS, "tool_choice": "required"},
        "tool_calls",
    ),
    "tool named": (
        CHAT,
        {
            "messages": SAID,
            "max_tokens": LONG,
            **TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        },
        "stop",
    ),
    "response": (
        RESPONSES,
        {"input": TEXT, "max_output_tokens": 8, "instructions": "Be brief."},
        "incomplete",
    ),
    "items": (RESPONSES, {"input": SAID, "max_output_tokens": 8}, "incomplete"),
    "response format": (
        RESPONSES,
        {
            "input": TEXT,
            "max_output_tokens": LONG,
            "text": {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA}},
        },
        "completed",
    ),
    "response tools auto": (RESPONSES, {"input": TEXT, "max_output_tokens": 8, **ITEM_TOOLS}, "incomplete"),
    "response tool required": (
        RESPONSES,
        {"input": TEXT, "max_output_tokens": LONG, **ITEM_TOOLS, "tool_choice": "required"},
        "completed",
    ),
    "message": (MESSAGES, {"messages": SAID, "max_tokens": 8, "system": "Be brief."}, "max_tokens"),
    "message stop": (
        MESSAGES,
        {"messages": SAID, "max_tokens": LONG, "stop_sequences": ["e"]},
        "stop_sequence",
    ),
    "message tools auto": (MESSAGES, {"messages": SAID, "max_tokens": 8, **MESSAGE_TOOLS}, "max_tokens"),
    "message tool any": (
        MESSAGES,
        {"messages": SAID, "max_tokens": LONG, **MESSAGE_TOOLS, "tool_choice": {"type": "any"}},
        "tool_use",
    ),
    "message tool named": (
        MESSAGES,
        {
            "messages": SAID,
            "max_tokens": LONG,
            **MESSAGE_TOOLS,
            "tool_choice": {"type": "tool", "name": "weather"},
        },
        "tool_use",
    ),
    "generate": (
        GENERATE,
        {"token_ids": IDS, "sampling_params": {"max_tokens": 8, "temperature": 0, "logprobs": 2}},
        "length",
    ),
    "generate stop": (
        GENERATE,
        {
            "token_ids": IDS,
            "sampling_params": {
                "max_tokens": LONG,
                "min_tokens": 3,
                "temperature": 0,
                "stop_token_ids": [50],
                "logit_bias": {"50": 100},
            },
        },
        "stop",
    ),
}


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    config = {
        "prefill_instances": [pair.prefill.entry("p")],
        "decode_instances": [pair.decode.entry("d")],
        "public_paths": list(PATHS),
    }
    with spawned(stack.up(config)):
        yield stack


async def emptied(*instances: Instance) -> None:
    """Empty the caches of instances, once nothing is in use there."""
    async with aiohttp.ClientSession() as session:
        for instance in instances:

            async def empty(url: str = instance.url + "/reset_prefix_cache") -> bool:
                async with session.post(url) as response:
                    return bool((await response.json())["success"])

            await until(empty)


def request(name: str, stream: bool) -> tuple[str, dict[str, Any]]:
    path, fields, _ = REQUESTS[name]
    body = {"model": MODEL, **fields}
    if path != GENERATE:
        body.setdefault("temperature", 0)
    if stream:
        body["stream"] = True
    if stream and path in (COMPLETIONS, CHAT, GENERATE):
        body |= COUNTED
    return path, body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", REQUESTS)
async def test_the_answer_is_that_of_one_engine_alone(
    stack: Stack, pair: Pair, name: str, stream: bool
) -> None:
    await ready(stack)
    path, body = request(name, stream)
    await emptied(pair.decode)
    expected = await post(pair.decode.url, path, body)
    assert expected.status == 200, expected
    endings = found(answered(expected), "finish_reason", "stop_reason", "status")
    assert REQUESTS[name][2] in endings, "what the row is for"
    await emptied(pair.prefill, pair.decode)
    before = await pair.decode.transferred()
    answer = await post(stack.url, path, body)
    assert answer.status == 200, answer
    assert answer.headers["x-pd-prefill"] == "p"
    assert "x-pd-cached-tokens" not in answer.headers, "usage says it"
    assert comparable(answered(answer)) == comparable(answered(expected))

    async def risen() -> bool:
        return await pair.decode.transferred() - before > 100

    await until(risen)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", ["completion", "chat", "response", "message", "generate"])
async def test_what_a_second_turn_had_cached(stack: Stack, pair: Pair, name: str, stream: bool) -> None:
    """As one engine alone, though D has got all of it from P."""
    await ready(stack)
    path, body = request(name, stream)
    longer = json.loads(json.dumps(body).replace(TEXT, TEXT[:-40] + "and then stops."))
    if path == GENERATE:
        longer["token_ids"] = [*IDS[:-40], 20, 21]
    said: dict[str, list[list[int]]] = {}
    for url in (pair.decode.url, stack.url):
        await emptied(pair.prefill, pair.decode)
        for turn in (body, body, longer):
            answer = await post(url, path, turn)
            assert answer.status == 200, answer
            said.setdefault(url, []).append(found(answered(answer), *CACHED))
    assert said[stack.url] == said[pair.decode.url]
    assert max(said[stack.url][1]) > 100
    assert 100 < max(said[stack.url][2]) < max(said[stack.url][1])
