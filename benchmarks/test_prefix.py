"""What a lookup costs: reading and hashing a prompt, finding its holders, recording it; and the memory.

``HOLDERS`` is how many there are at most.
"""

import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest

from vllm_pd_scheduler.prediction.prefix_index import Holder, PrefixIndex
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.json_text import finish
from vllm_pd_scheduler.request.prompt import read_prompt

HOLDERS = int(os.environ.get("HOLDERS", "1000"))
HELD = 10_000
"""Blocks of each holder, where memory is measured."""

draw = random.Random(1)
ENGLISH = "The quick brown fox jumps over the lazy dog.\n" * 456  # 20 KB
CHINESE = "敏捷的棕色狐狸跳过懒狗。\n" * 554
SHARED = 8
"""Blocks that all holders have: a system prompt."""


def chain(length: int, start: tuple[int, ...] = ()) -> tuple[int, ...]:
    return start + tuple([draw.getrandbits(60) for _ in range(length - len(start))])


def body(**fields: Any) -> JsonBody:
    text = json.dumps({"model": "m", **fields}, ensure_ascii=False, separators=(",", ":"))
    return JsonBody.parse(text.encode())


def chat(content: str, messages: int) -> JsonBody:
    return body(messages=[{"role": "user", "content": content}] * messages)


def filled(holders: int, capacity: int, start: tuple[int, ...]) -> tuple[PrefixIndex, list[Holder]]:
    index = PrefixIndex()
    members = [index.add(capacity) for _ in range(holders)]
    for _ in range(capacity * 2 // 400):  # twice what fits: they have evicted
        for member in members:
            member.store(chain(400, start))
    return index, members


@pytest.mark.parametrize(
    "request_body",
    [
        pytest.param(chat(ENGLISH, 20), id="chat-100k-tokens"),
        pytest.param(chat(CHINESE, 20), id="chat-400KB-chinese"),
        pytest.param(body(prompt=ENGLISH * 20), id="text-100k-tokens"),
        pytest.param(body(prompt=[draw.randrange(150_000) for _ in range(100_000)]), id="ids-100k-tokens"),
        pytest.param(chat("Hello. " * 28, 1), id="chat-200-bytes"),
    ],
)
def test_read_prompt(benchmark: Any, request_body: JsonBody) -> None:
    assert benchmark(lambda: finish(read_prompt(request_body))).size


@pytest.fixture(scope="module", params=[16, HOLDERS], ids="{}-holders".format)
def fleet(request: pytest.FixtureRequest) -> tuple[PrefixIndex, list[Holder], tuple[int, ...]]:
    start = chain(SHARED)
    return *filled(request.param, 2000, start), start


@pytest.mark.parametrize("length", [25, 400])
def test_match(benchmark: Any, fleet: Any, length: int) -> None:
    index, holders, start = fleet
    blocks = chain(length, start)
    holders[3].store(blocks)
    assert benchmark(index.match, tuple(map(int, map(str, blocks))))[holders[3]] == length


def test_store_what_is_held(benchmark: Any, fleet: Any) -> None:
    benchmark(fleet[1][0].store, chain(400, fleet[2]))


def test_store_what_is_new(benchmark: Any, fleet: Any) -> None:
    _, holders, start = fleet

    def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (chain(400, start),), {}

    benchmark.pedantic(draw.choice(holders).store, setup=arguments, rounds=500)


def test_lookup(benchmark: Any, fleet: Any) -> None:
    """From the split body of a chat of 100,000 tokens to its holders, of which all have a part."""
    index, holders, _ = fleet
    request_body = chat(ENGLISH, 20)
    blocks = finish(read_prompt(request_body)).blocks
    for holder in holders:
        holder.store(blocks[:SHARED])
    holders[3].store(blocks)
    assert len(benchmark(lambda: index.match(finish(read_prompt(request_body)).blocks))) == len(holders)


def test_memory(benchmark: Any) -> None:
    """``HOLDERS`` of ``HELD`` blocks each stay below 2 GiB if they are 1,000, in a process of their own."""

    def measure() -> float:
        return float(subprocess.check_output([sys.executable, __file__]))

    gibibytes = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["GiB"] = gibibytes
    blocks = HOLDERS * HELD
    print(
        f"\n{blocks / 1e6:g} million blocks: {gibibytes:.2f} GiB, {gibibytes * 2**30 / blocks:.0f} bytes each"
    )
    assert gibibytes < 2


if __name__ == "__main__":
    kept = filled(HOLDERS, HELD, chain(SHARED))
    with open("/proc/self/statm") as statm:
        print(int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**30)
