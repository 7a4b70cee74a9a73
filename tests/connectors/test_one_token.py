"""The request for one token that P gets, whatever the protocol."""

import json
from typing import Any

import pytest

from vllm_pd_scheduler.connectors.one_token import one_token
from vllm_pd_scheduler.request.body import AT_ONCE_BYTES, JsonBody

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
