"""When two answers are taken for those of one KV cache."""

import json
from random import Random
from typing import Any

import pytest

from vllm_pd_scheduler.self_check.comparison import Verdict, compare
from vllm_pd_scheduler.self_check.prompt import new_prompt


def answer(text: str, likely: list[dict[str, float]] | None = None) -> bytes:
    """A completion as vLLM writes it, a word for each token."""
    choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    if likely is not None:
        tokens = text.split()
        chosen = [each.get(token) for token, each in zip(tokens, likely, strict=True)]
        choice["logprobs"] = {
            **{"text_offset": [0] * len(tokens), "token_logprobs": chosen},
            **{"tokens": tokens, "top_logprobs": likely},
        }
    return json.dumps({"id": "cmpl-1", "choices": [choice], "usage": {}}).encode()


SURE = {"river": -0.01, "stone": -5.0}
OPEN = {"river": -0.9, "stone": -1.0, "tiger": -1.1}


@pytest.mark.parametrize(
    ("split", "whole", "verdict"),
    [
        (answer("a b"), answer("a b"), Verdict.MATCH),
        (answer("a b"), answer("a c"), Verdict.MISMATCH),
        (answer("river"), answer("river x"), Verdict.MISMATCH),
        (answer("river", [SURE]), answer("river", [OPEN]), Verdict.MATCH),
        (answer("stone", [OPEN]), answer("river", [OPEN]), Verdict.CLOSE),
        (answer("stone", [{"stone": -0.1}]), answer("river", [OPEN]), Verdict.MISMATCH),
        (answer("stone", [OPEN]), answer("river", [SURE]), Verdict.MISMATCH),
        (answer("stone", [{"stone": -0.1, "river": -4.0}]), answer("river", [SURE]), Verdict.MISMATCH),
        (answer("river stone", [SURE, OPEN]), answer("river tiger", [SURE, OPEN]), Verdict.CLOSE),
        (answer("stone"), answer("river", [OPEN]), Verdict.MISMATCH),
        (answer(""), answer(""), Verdict.FAILED),
        (answer("a"), b'{"choices": []}', Verdict.FAILED),
        (answer("a"), b'{"choices": [{"text": 1}]}', Verdict.FAILED),
        (b"\xff", answer("a"), Verdict.FAILED),
        (b"[" * 100_000, answer("a"), Verdict.FAILED),
    ],
)
def test_verdicts(split: bytes, whole: bytes, verdict: Verdict) -> None:
    assert compare(split, whole) is verdict


def test_no_prompt_comes_twice_and_the_answer_stands_in_it() -> None:
    random = Random(1)
    prompts = [new_prompt(random) for _ in range(100)]
    assert len({prompt[:64] for prompt in prompts}) == 100
    for prompt in prompts:
        said, _, again = prompt.partition(". Once more: ")
        assert said.startswith(f"{again} ")
