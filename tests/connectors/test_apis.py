"""Each API's request for one token, which of its requests can be split, and what its answers tell."""

import json
from typing import Any

import pytest

from vllm_pd_scheduler.connectors.one_token import can_split, counted, has_stopped, one_token
from vllm_pd_scheduler.request.api import APIS, CHAT, COMPLETIONS, GENERATE, MESSAGES, NATIVE, RESPONSES, Api
from vllm_pd_scheduler.request.body import JsonBody

MESSAGE = {"role": "user", "content": "x"}
LEAST: dict[Api, dict[str, Any]] = {
    COMPLETIONS: {"model": "m", "prompt": "x"},
    CHAT: {"model": "m", "messages": [MESSAGE]},
    RESPONSES: {"model": "m", "input": "x"},
    MESSAGES: {"model": "m", "messages": [MESSAGE], "max_tokens": 9},
    NATIVE: {"text": "x", "sampling_params": {"max_new_tokens": 9}},
    GENERATE: {"model": "m", "token_ids": [1, 2], "sampling_params": {"max_tokens": 9, "seed": 1.50}},
}
"""A request of each."""


def body(api: Api, **more: Any) -> JsonBody:
    return JsonBody.parse(json.dumps({**LEAST[api], **more}).encode(), api)


def sent(api: Api, **more: Any) -> dict[str, Any]:
    return json.loads(one_token(body(api, **more), {"k": b"{}"}))


def test_each_api_has_a_sample() -> None:
    assert set(LEAST) == set(APIS.values())


@pytest.mark.parametrize(
    ("api", "given", "expected"),
    [
        (COMPLETIONS, {"max_tokens": 9, "min_tokens": 3}, {"max_tokens": 1}),
        (CHAT, {"max_completion_tokens": 9}, {"max_tokens": 1, "max_completion_tokens": 1}),
        (CHAT, {"stream": True, "stream_options": {}}, {"max_tokens": 1}),
        (RESPONSES, {"max_output_tokens": 9, "store": True}, {"max_output_tokens": 1, "store": False}),
        (RESPONSES, {"instructions": "y"}, {"instructions": "y", "max_output_tokens": 1, "store": False}),
        (MESSAGES, {"system": "y", "stream": True}, {"system": "y", "max_tokens": 1}),
        (
            GENERATE,
            {"stream": True, "stream_options": {"include_usage": True}},
            {"sampling_params": {"max_tokens": 1, "seed": 1.5}},
        ),
        (
            GENERATE,
            {"sampling_params": {"min_tokens": 5, "a": [1]}},
            {"sampling_params": {"max_tokens": 1, "a": [1]}},
        ),
    ],
)
def test_the_request_for_one_token(api: Api, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sent(api, **given) == {**LEAST[api], **expected, "stream": False, "k": {}}


def test_a_number_of_the_clients_is_passed_as_it_is_written() -> None:
    raw = b'{"token_ids":[1],"sampling_params":{"temperature":0.10}}'
    assert b'"temperature":0.10' in one_token(JsonBody.parse(raw, GENERATE), {})


@pytest.mark.parametrize(
    ("api", "more", "expected"),
    [
        *((api, {}, api is not NATIVE) for api in LEAST),  # that is no path of vLLM's
        (RESPONSES, {"background": True}, False),
        (RESPONSES, {"background": False}, True),
        (RESPONSES, {"previous_response_id": "resp_1"}, False),
        (RESPONSES, {"previous_response_id": None}, True),
        (RESPONSES, {"tools": [{"type": "function", "name": "f"}]}, True),
        (RESPONSES, {"tools": [{"type": "function"}, {"type": "code_interpreter"}]}, False),
        (RESPONSES, {"tools": [{"type": "mcp"}]}, False),
        (RESPONSES, {"tools": [{}]}, False),
        (RESPONSES, {"tools": None}, True),
        (RESPONSES, {"tools": "x"}, False),
        (RESPONSES, {"tools": [{"type": "function", "description": "x" * (1 << 20)}]}, False),
        (CHAT, {"tools": [{"type": "code_interpreter"}]}, True),
        (MESSAGES, {"tools": [{"name": "f"}]}, True),
        (GENERATE, {"sampling_params": {"n": 2}}, False),
        (GENERATE, {"sampling_params": {"n": 1}}, True),
        (GENERATE, {"sampling_params": {"prompt_logprobs": 1}}, False),
        (GENERATE, {"sampling_params": None}, False),
        (GENERATE, {"sampling_params": {"a": "x" * 5000}}, False),
    ],
)
def test_what_can_be_split(api: Api, more: dict[str, Any], expected: bool) -> None:
    assert can_split(body(api, **more)) is expected


def test_a_request_without_token_ids() -> None:
    assert not can_split(JsonBody.parse(b'{"sampling_params":{}}', GENERATE))


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}, (7, 3)),
        ({"input_tokens": 7, "input_tokens_details": {"cached_tokens": 3}}, (7, 3)),
        ({"input_tokens": 7, "input_tokens_details": {"cached_tokens": 9}}, (7, 7)),
        # Anthropic's input_tokens are those that were neither read from a cache nor written to it.
        ({"input_tokens": 7, "cache_read_input_tokens": 3}, (10, 3)),
        ({"input_tokens": 4, "cache_creation_input_tokens": 736, "cache_read_input_tokens": 0}, (740, 0)),
        ({"input_tokens": 0, "cache_read_input_tokens": 9}, (9, 9)),
        ({"input_tokens": 7}, (7, None)),
        ({"input_tokens": -7}, (None, None)),
        (None, (None, None)),
    ],
)
def test_what_is_counted(usage: Any, expected: tuple[int | None, int | None]) -> None:
    assert counted(json.dumps({"usage": usage}).encode()) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"choices": [{"finish_reason": "stop"}]}, True),
        ({"choices": [{"finish_reason": "length"}]}, False),
        ({"status": "completed"}, True),
        ({"status": "incomplete"}, False),
        ({"stop_reason": "end_turn"}, True),
        ({"stop_reason": "max_tokens"}, False),
        ({}, False),
        ([], False),
    ],
)
def test_whether_the_first_token_was_the_last(answer: Any, expected: bool) -> None:
    assert has_stopped(json.dumps(answer).encode()) is expected
