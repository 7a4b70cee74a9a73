"""A real vLLM pair with NIXL behind the real Envoy: greedy output equals an aggregated instance's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Stack, spawned
from tests.support.real_vllm import AGGREGATED, Pair, completion, post, ready
from tests.support.waiting import until

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    config = {"prefill_instances": [pair.prefill.entry("p")], "decode_instances": [pair.decode.entry("d")]}
    with spawned(stack.up(config)):
        yield stack


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("number", range(3))
async def test_greedy_output_equals_the_aggregated_instances(
    stack: Stack, pair: Pair, chat: bool, stream: bool, number: int
) -> None:
    await ready(stack)
    body = completion(f"{chat}-{stream}-{number}", max_tokens=24, stream=stream)
    if chat:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    path = "/v1/chat/completions" if chat else "/v1/completions"
    expected = await post(AGGREGATED, path, body)
    before = await pair.decode.transferred()
    answer = await post(stack.url, path, body)
    assert answer.text == expected.text
    assert answer.text
    assert (answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]) == ("p", "d")

    async def risen() -> bool:
        return await pair.decode.transferred() - before > 200

    await until(risen)


@pytest.mark.parametrize(
    "odd",
    [
        lambda fields: {**fields, "prompt": [fields["prompt"]]},
        lambda fields: {
            **fields,
            "prompt": [[(number * os.getpid() + 7) % 900 + 20 for number in range(300)]],
        },
        lambda fields: b"\xef\xbb\xbf" + json.dumps(fields).encode(),
        lambda fields: {**fields, "x": [float("nan"), float("-inf")]},
        lambda fields: {**fields, "x": "\ud800", "user": "\udc00"},
        lambda fields: {**fields, "x": ["y"] * 30_000, "min_tokens": 3, "stream_options": None},
    ],
    ids=["text in a list", "ids in a list", "BOM", "NaN", "surrogates", "long"],
)
async def test_what_it_reads_is_split(stack: Stack, pair: Pair, odd: Callable[[Any], Any]) -> None:
    await ready(stack)
    body = odd(completion(str(odd.__code__.co_firstlineno), max_tokens=24))
    expected = await post(AGGREGATED, "/v1/completions", body)
    before = await pair.decode.transferred()
    answer = await post(stack.url, "/v1/completions", body)
    assert answer.text == expected.text
    assert answer.headers["x-pd-prefill"] == "p"

    async def risen() -> bool:
        return await pair.decode.transferred() - before > 200

    await until(risen)


@pytest.mark.parametrize(
    ("extra", "status"),
    [({"model": "no-such-model"}, 404), ({"prompt": "word " * 9000}, 400), ({"max_tokens": -1}, 400)],
    ids=["unknown model", "prompt too long", "bad value"],
)
async def test_its_own_errors_pass_unchanged(stack: Stack, extra: dict[str, Any], status: int) -> None:
    await ready(stack)
    body = {"prompt": "p", "max_tokens": 4, **extra}
    expected = await post(AGGREGATED, "/v1/completions", body)
    answer = await post(stack.url, "/v1/completions", body)
    error, own = answer.json["error"], expected.json["error"]
    if (
        status == 404
    ):  # of the fleet's models, the scheduler's answer; vLLM 0.33 adds those that one engine has
        assert own["message"].startswith(error["message"])
        own["message"] = error["message"]
    assert (answer.status, error) == (status, own)


async def test_a_clients_own_hand_off_does_not_reach_it(stack: Stack) -> None:
    """It would end the decode engine: after each of these, the pair still answers right."""
    await ready(stack)
    body = completion("evil", max_tokens=4)
    expected = await post(AGGREGATED, "/v1/completions", body)
    for evil in ({"do_remote_prefill": True}, {"do_remote_prefill": True, "remote_block_ids": [1]}):
        answer = await post(stack.url, "/v1/completions", {**body, "kv_transfer_params": evil})
        assert answer.text == expected.text
        sampled = {**body, "n": 2, "temperature": 1, "kv_transfer_params": evil}
        assert (await post(stack.url, "/v1/completions", sampled)).status == 200
    assert (await post(stack.url, "/v1/completions", body)).text == expected.text
