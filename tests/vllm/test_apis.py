"""The APIs on a real vLLM pair: the whole answer equals an aggregated instance's, field by field.

Not ``/inference/v1/generate``, which vLLM serves only with ``--enable-scale-out``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Stack, spawned
from tests.support.real_vllm import AGGREGATED, MODEL, Pair, post, ready
from tests.support.waiting import until

pytestmark = pytest.mark.vllm

OWN = frozenset(
    {"id", "created", "created_at", "completed_at", "request_id", "item_id", "system_fingerprint"}
    | {"kv_transfer_params", "cache_write_tokens"}
)
"""Fields that differ from answer to answer and from server to server, and the hand-off.

What D has fetched, it has not written to its cache."""
MARK = "<name>"
"""Stands for the name of the request, so that nothing of its prompt is cached anywhere."""
TEXT = f"{MARK} " * 4 + "Whatever it is called, an answer is an answer, and it says so at some length. " * 12
SAID = [{"role": "user", "content": TEXT}]
TOOL = {
    "name": "weather",
    "description": "Say how it is.",
    "parameters": {"type": "object", "properties": {}},
}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": TEXT, "max_tokens": 8, "logprobs": 2}),
    "stop": ("/v1/completions", {"prompt": TEXT, "max_tokens": 40, "stop": ["e"]}),
    "chat": (
        "/v1/chat/completions",
        {"messages": SAID, "max_tokens": 8, "logprobs": True, "top_logprobs": 2},
    ),
    "tools": (
        "/v1/chat/completions",
        {
            "messages": SAID,
            "max_tokens": 8,
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": "none",
        },
    ),
    "response": ("/v1/responses", {"input": TEXT, "max_output_tokens": 8, "instructions": "Be brief."}),
    "items": ("/v1/responses", {"input": SAID, "max_output_tokens": 8}),
    "message": ("/v1/messages", {"messages": SAID, "max_tokens": 8, "system": "Be brief."}),
}


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    config = {
        "prefill_instances": [pair.prefill.entry("p")],
        "decode_instances": [pair.decode.entry("d")],
        "public_paths": ["/v1/responses", "/v1/messages"],
    }
    with spawned(stack.up(config)):
        yield stack


def comparable(value: Any, key: str = "") -> Any:
    """An answer without what differs from answer to answer, at any depth."""
    if isinstance(value, dict):
        return {k: comparable(v, k) for k, v in value.items() if k not in OWN}
    if isinstance(value, list):
        return [comparable(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_answer_is_that_of_an_undivided_instance(stack: Stack, pair: Pair, name: str) -> None:
    await ready(stack)
    path, fields = REQUESTS[name]
    body = json.loads(json.dumps({"model": MODEL, **fields}).replace(MARK, name * 5))
    body["temperature"] = 0
    expected = await post(AGGREGATED, path, body)
    assert expected.status == 200, expected
    before = await pair.decode.transferred()
    answer = await post(stack.url, path, body)
    assert answer.status == 200, answer
    assert answer.headers["x-pd-prefill"] == "p"
    # Cached where: the aggregated one had the prompt never before, P neither.
    assert comparable(answer.json) == comparable(expected.json)

    async def risen() -> bool:
        return await pair.decode.transferred() - before > 100

    await until(risen)
