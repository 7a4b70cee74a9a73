"""What routing knows of the prompts and the limits of each API."""

import json
from typing import Any

import pytest

from tests.request.documents import in_steps
from vllm_pd_scheduler.request.api import APIS, CHAT, GENERATE, MESSAGES, NATIVE, RESPONSES, Api
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.fingerprint import fingerprint
from vllm_pd_scheduler.request.json_text import finish
from vllm_pd_scheduler.request.path import PUBLIC_PATHS, SPLIT_PATHS
from vllm_pd_scheduler.request.prompt import BLOCK_BYTES, Prompt, read_prompt

LONG = "".join(f"Sentence {number} of a long text. " for number in range(200))


def parsed(api: Api, **fields: Any) -> JsonBody:
    return JsonBody.parse(json.dumps({"model": "m", **fields}).encode(), api)


def read(api: Api, **fields: Any) -> Prompt:
    return finish(read_prompt(parsed(api, **fields)))


def read_in_steps(api: Api, **fields: Any) -> Prompt:
    raw = json.dumps({"model": "m", **fields}, separators=(",", ":"), sort_keys=True).encode()
    with in_steps():
        return finish(read_prompt(JsonBody.parse(raw, api)))


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def test_the_paths_that_are_always_public_are_split() -> None:
    assert set(SPLIT_PATHS) < set(APIS)
    assert set(APIS) - set(SPLIT_PATHS) - set(PUBLIC_PATHS) == {GENERATE.path, NATIVE.path}


@pytest.mark.parametrize(
    ("api", "first", "second"),
    [
        (
            RESPONSES,
            {"instructions": LONG, "input": [said("user", LONG)]},
            {"instructions": LONG, "input": [said("user", LONG), said("assistant", "a"), said("user", LONG)]},
        ),
        (
            RESPONSES,
            {
                "input": [
                    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": LONG}]}
                ]
            },
            {
                "input": [
                    said("user", LONG),
                    {"type": "function_call", "name": "f", "call_id": "c", "arguments": LONG},
                    {"type": "function_call_output", "call_id": "c", "output": LONG},
                ]
            },
        ),
        (RESPONSES, {"input": LONG}, {"input": [said("user", LONG), said("assistant", LONG)]}),
        (
            MESSAGES,
            {"system": LONG, "messages": [said("user", LONG)]},
            {
                "system": [{"type": "text", "text": LONG}],
                "messages": [said("user", LONG), said("user", LONG)],
            },
        ),
        (GENERATE, {"token_ids": list(range(2000))}, {"token_ids": list(range(4000))}),
    ],
)
def test_what_extends_a_prompt_extends_its_blocks(
    api: Api, first: dict[str, Any], second: dict[str, Any]
) -> None:
    one, other = read(api, **first), read(api, **second)
    assert len(one.blocks) >= 5
    assert other.blocks[: len(one.blocks)] == one.blocks
    assert len(other.blocks) > len(one.blocks)


def test_a_system_prompt_alone_is_shared_by_conversations() -> None:
    one = read(MESSAGES, system=LONG, messages=[said("user", "a" * 2000)])
    other = read(MESSAGES, system=LONG, messages=[said("user", "b" * 2000)])
    whole = len(LONG) // BLOCK_BYTES
    assert one.blocks[:whole] == other.blocks[:whole]
    assert one.blocks[-1] != other.blocks[-1]


@pytest.mark.parametrize("api", [RESPONSES, MESSAGES])
def test_a_long_prompt_is_read_in_steps_alike(api: Api) -> None:
    key = api.prompt[-1]
    fields = {api.prompt[0]: LONG, key: [said("user", LONG), said("user", LONG)]}
    whole, stepped = read(api, **fields), read_in_steps(api, **fields)
    assert whole.size == pytest.approx(stepped.size, rel=0.05)
    if api is MESSAGES:
        assert whole == stepped


def test_token_ids_are_counted_exactly() -> None:
    assert read(GENERATE, token_ids=[1, 22, 333]).tokens == 3


@pytest.mark.parametrize(
    ("api", "fields"),
    [
        (RESPONSES, {"input": 5}),
        (RESPONSES, {"input": {"a": 1}}),
        (RESPONSES, {"input": [LONG]}),
        (RESPONSES, {"instructions": 5, "input": LONG}),
        (RESPONSES, {}),
        (MESSAGES, {"messages": LONG}),
        (MESSAGES, {"system": {"a": 1}, "messages": [said("user", LONG)]}),
        (CHAT, {"input": LONG}),
        (GENERATE, {"token_ids": LONG}),
        (GENERATE, {"token_ids": ["a"]}),
        (GENERATE, {}),
    ],
)
def test_what_is_malformed_has_no_blocks(api: Api, fields: dict[str, Any]) -> None:
    assert read(api, **fields).blocks == ()
    assert read_in_steps(api, **fields).blocks == ()


@pytest.mark.parametrize(
    ("api", "fields", "expected"),
    [
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (CHAT, {"max_tokens": 5}, 5),
        (RESPONSES, {"max_output_tokens": 5, "max_tokens": 7}, 5),
        (RESPONSES, {"max_tokens": 7}, None),
        (MESSAGES, {"max_tokens": 5}, 5),
        (GENERATE, {"sampling_params": {"max_tokens": 5}, "max_tokens": 7}, 5),
        (GENERATE, {"sampling_params": {"max_tokens": "5"}}, None),
        (GENERATE, {"sampling_params": [5]}, None),
        (GENERATE, {}, None),
    ],
)
def test_the_limit_of_an_answer(api: Api, fields: dict[str, Any], expected: int | None) -> None:
    assert parsed(api, **fields).answer_limit == expected


def test_a_prompt_is_known_again() -> None:
    for api in (RESPONSES, MESSAGES, GENERATE):
        key = api.prompt[-1]
        assert fingerprint(parsed(api, **{key: [1]})) == fingerprint(parsed(api, **{key: [1], "user": "u"}))
        assert fingerprint(parsed(api, **{key: [1]})) != fingerprint(parsed(api, **{key: [2]}))
        assert fingerprint(parsed(api)) == 0
