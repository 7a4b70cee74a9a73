"""The request for one token that P gets, whatever the protocol."""

import json
from typing import Any

import pytest

from vllm_pd_scheduler.connectors.one_token import has_stopped, one_token, was_cut
from vllm_pd_scheduler.request.api import GENERATE, MESSAGES, RESPONSES, Api
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.json_text import AT_ONCE_BYTES

TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}
LONG: dict[str, Any] = {"model": "m", "prompt": "x" * (2 * AT_ONCE_BYTES)}
"""A body that is read in steps, and so put together in another way."""


@pytest.mark.parametrize("base", [TEXT, LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    ("client", "plain", "past_stop"),
    [
        ({}, {}, {}),
        ({"min_tokens": 9}, {}, {}),
        ({"stop": "x"}, {"stop": "x"}, {}),
        ({"stop": ["x"] * 3000}, {"stop": ["x"] * 3000}, {}),
        ({"stop_token_ids": [7]}, {"stop_token_ids": [7]}, {}),
        ({"stop": None, "stop_token_ids": None}, {"stop": None, "stop_token_ids": None}, {}),
        ({"ignore_eos": True}, {"ignore_eos": True}, {"ignore_eos": True}),
        ({"max_completion_tokens": 5}, {"max_completion_tokens": 1}, {"max_completion_tokens": 1}),
    ],
)
def test_each(
    base: dict[str, Any], client: dict[str, Any], plain: dict[str, Any], past_stop: dict[str, Any]
) -> None:
    body = JsonBody.parse(json.dumps({**base, **client, "max_tokens": 9, "stream": True}).encode())
    one = {**base, "max_tokens": 1, "stream": False, "kv": {}}
    assert json.loads(one_token(body, {"kv": b"{}"})) == {**one, **plain}
    assert json.loads(one_token(body, {"kv": b"{}"}, past_stop=True)) == {**one, "min_tokens": 1, **past_stop}


SAMPLING = {"max_tokens": 9, "min_tokens": 2, "stop": ["x"], "stop_token_ids": [7], "temperature": 0.5}


@pytest.mark.parametrize(
    ("api", "client", "sent"),
    [
        (
            RESPONSES,
            {"input": "x", "stop": ["x"], "stop_token_ids": [7]},
            {"input": "x", "max_output_tokens": 1, "stream": False, "store": False},
        ),
        (
            MESSAGES,
            {"messages": [], "stop_sequences": ["x"]},
            {"messages": [], "max_tokens": 1, "stream": False},
        ),
        (
            GENERATE,
            {"token_ids": [1], "sampling_params": SAMPLING},
            {
                "token_ids": [1],
                "stream": False,
                "sampling_params": {"max_tokens": 1, "min_tokens": 1, "temperature": 0.5},
            },
        ),
    ],
)
def test_past_stop_in_other_apis(api: Api, client: dict[str, Any], sent: dict[str, Any]) -> None:
    """Responses and Messages cannot forbid an end: P that stops all the same has handed nothing over."""
    body = JsonBody.parse(json.dumps(client).encode(), api)
    assert json.loads(one_token(body, {}, past_stop=True)) == sent


@pytest.mark.parametrize(
    ("answer", "cut", "stopped"),
    [
        ({"choices": [{"finish_reason": "length"}]}, True, False),
        ({"choices": [{"finish_reason": "tool_calls"}]}, True, False),
        ({"choices": [{"finish_reason": "stop"}]}, False, True),
        ({"choices": [{"finish_reason": "length"}] * 2}, False, False),
        ({"status": "incomplete"}, True, False),
        ({"status": "completed"}, False, True),
        ({"status": "failed"}, False, False),
        ({"stop_reason": "max_tokens"}, True, False),
        ({"stop_reason": "end_turn"}, False, True),
        ({}, False, False),
        ({"choices": 5}, False, False),
    ],
)
def test_why_an_answer_has_ended(answer: dict[str, Any], cut: bool, stopped: bool) -> None:
    raw = json.dumps(answer).encode()
    assert (was_cut(raw), has_stopped(raw)) == (cut, stopped)
