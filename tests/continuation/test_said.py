"""What can go on, and how the words of two instances become one answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_pd_scheduler.continuation.asked import CHAT, COMPLETIONS, Asked
from vllm_pd_scheduler.continuation.said import Said

FIRST = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m"}
SECOND = {"id": "b", "object": "text_completion", "created": 2, "model": "m"}


def asked(path: str = CHAT, **more: Any) -> Asked | None:
    what = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return Asked.read(path, json.dumps({**what, "stream": True, **more}).encode())


def event(head: dict[str, Any], *choices: dict[str, Any], **more: Any) -> bytes:
    return b"data: " + json.dumps({**head, "choices": choices, **more}, separators=(",", ":")).encode()


def token(text: str, *ids: int) -> bytes:
    return event(FIRST, {"index": 0, "delta": {"content": text}, "finish_reason": None, "token_ids": ids})


def said(*events: bytes, **more: Any) -> Said:
    request = asked(**more)
    assert request is not None
    found = Said(request)
    role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    for each in (event(FIRST, role, prompt_token_ids=[1, 2]), *events):
        found.take(each + b"\n\n")
    found.read()
    return found


@pytest.mark.parametrize(
    "more",
    [
        {"stream": False},
        {"stream": "true"},
        {"n": 2},
        {"stop": ["x"]},
        {"tools": [{}]},
        {"logprobs": True},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"include_reasoning": False},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -1},
        {"min_tokens": 3},
        {"bad_words": ["x"]},
        {"response_format": {"type": "json_object"}},
        {"echo": True},
        {"max_tokens": "many"},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"nobody_knows": 1},
        {"stream_options": [1]},
        {"messages": []},
        {"messages": ["x"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": 3}]},
    ],
)
def test_what_cannot_go_on(more: dict[str, Any]) -> None:
    assert asked(**more) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"stream":true}', b"[" * 100_000])
def test_what_is_no_request(body: bytes) -> None:
    assert Asked.read(CHAT, body) is None


@pytest.mark.parametrize("prompt", [["a", "b"], [], [True], {}, None])
def test_several_prompts_cannot_go_on(prompt: Any) -> None:
    assert asked(COMPLETIONS, prompt=prompt) is None


def test_the_rest_has_what_counts_for_the_next_token() -> None:
    request = asked(temperature=0.5, seed=7, stop=[], n=1, tools=None, presence_penalty=0, model="m")
    assert request is not None
    assert json.loads(request.body)["return_token_ids"] is True
    assert json.loads(request.rest([1, 2], 3)) == {
        **{"model": "m", "temperature": 0.5, "seed": 7},
        **{"prompt": [1, 2], "max_tokens": 3, "stream": True},
    }


def test_a_wish_for_ids_is_the_clients_last_word() -> None:
    request = asked(return_token_ids=False)
    assert request is not None
    assert json.loads(request.body)["return_token_ids"] is True


def test_what_says_nothing_may_be_said() -> None:
    assert asked(logprobs=False, top_logprobs=0, prompt_logprobs=None, n=1, echo=False, stop=[]) is not None


def test_nothing_is_shown_before_the_first_word() -> None:
    """Else the rest would be asked for as a text, in which a model's thoughts stand too."""
    request = asked()
    assert request is not None
    found = Said(request)
    role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    begin = event(FIRST, role, prompt_token_ids=[1, 2]) + b"\n\n" + token("", 5) + b"\n\n"
    assert found.take(begin) == b""
    assert not found.began
    found.rest_begins()
    assert found.take(begin + token("a", 6) + b"\n\n").count(b"data: ") == 3
    assert found.began
    assert found.ids() == [1, 2, 5, 6]


@pytest.mark.parametrize(
    "nonsense",
    [
        b"data: {" + b'"x":' + b"[" * 100_000,
        b'data: {"choices":[{"token_ids":[18446744073709551615],"text":"a"}]}',
        b'data: {"choices":"none"}',
        b"data: {\xff}",
    ],
)
def test_an_engine_that_says_nonsense(nonsense: bytes) -> None:
    assert said(token("a", 5), nonsense, token("b", 6)).ids() is None


@pytest.mark.parametrize(
    "nonsense", [b"data: {" + b'"x":' + b"[" * 100_000, b'data: {"choices":7}', b"data: {\xff}"]
)
def test_a_second_engine_that_says_nonsense(nonsense: bytes) -> None:
    with pytest.raises(ValueError, match="no event of a completion"):
        said(token("a", 5)).take_rest(nonsense + b"\n\n")


def test_tokens_whose_text_was_held_back_are_written_again() -> None:
    found = said(token(" a", 5), token("", 6), token("", 7))
    assert found.ids() == [1, 2, 5]
    assert found.whole == 1
    assert not found.doubtful


def test_of_several_tokens_the_last_may_be_held_back() -> None:
    found = said(token(" a", 5, 6))
    assert found.doubtful == [5, 6]
    found.end_before(1)
    assert found.ids() == [1, 2, 5]


@pytest.mark.parametrize(
    "choice",
    [
        {"index": 0, "delta": {"reasoning": "hm"}, "token_ids": [5]},
        {"index": 0, "delta": {"tool_calls": [{}]}, "token_ids": [5]},
        {"index": 0, "delta": {"content": "a"}},
        {"index": 1, "delta": {"content": "a"}, "token_ids": [5]},
    ],
)
def test_an_answer_that_is_not_plain_text_does_not_go_on(choice: dict[str, Any]) -> None:
    assert said(event(FIRST, choice)).ids() is None


def test_a_text_that_looks_like_ids_is_the_clients() -> None:
    text = ',"token_ids":[1,2]'
    found = said()
    _, shown, _ = found.take(token(text, 5) + b"\n\n").split(b"\n\n")
    assert json.loads(shown[6:])["choices"][0] == {
        **{"index": 0, "delta": {"content": text}, "finish_reason": None},
    }


def test_the_rest_looks_like_the_first_part() -> None:
    found = said(token(" a", 5), stream_options={"include_usage": True})
    choice = {"index": 0, "text": " b", "finish_reason": "stop", "token_ids": [6], "prompt_token_ids": [1]}
    rest = found.take_rest(event(SECOND, choice) + b"\n\n")
    assert json.loads(rest[6:]) == {
        **FIRST,
        "choices": [{"index": 0, "delta": {"content": " b"}, "finish_reason": "stop"}],
    }
    usage = found.take_rest(event(SECOND, usage={"prompt_tokens": 3, "completion_tokens": 4}) + b"\n\n")
    assert json.loads(usage[6:])["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert not found.done
    assert found.take_rest(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    assert found.done


def test_an_end_that_is_missing_is_added() -> None:
    last = event(FIRST, {"index": 0, "delta": {"content": "a"}, "finish_reason": "stop", "token_ids": [5]})
    found = said(last, stream_options={"include_usage": True})
    first, done, _ = found.ending().split(b"\n\n")
    assert json.loads(first[6:])["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    assert done == b"data: [DONE]"


def test_an_engine_that_says_that_it_failed_has_broken_off() -> None:
    assert said(b'data: {"error":{"code":500,"message":"dead"}}').error
    assert not said(b'data: {"error":{"code":400,"message":"bad"}}').error
