"""Clients that leave between P's answer and D's start: P's blocks do not stay pinned for its lease (30 s)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import Stack, spawned
from tests.support.real_vllm import Pair, aggregated, completion, post, ready
from tests.support.waiting import until

pytestmark = pytest.mark.vllm

LEASE_S = 30.0
"""How long P keeps a hand-off that nobody frees. What is waited for less long was freed."""
HANDOFF = 0.003
"""What one prompt of these tests pins at most, as a share of P's KV cache."""


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    instances = {"prefill_instances": [pair.prefill.entry("p")], "decode_instances": [pair.decode.entry("d")]}
    with spawned(stack.up({**instances, "health_check_interval": 60.0})):
        yield stack


@asynccontextmanager
async def _client(stack: Stack, body: dict[str, Any]) -> AsyncIterator[None]:
    """A client that has sent a request, and leaves at the end of the block."""
    task = asyncio.ensure_future(post(stack.url, "/v1/completions", body))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _with_decode(stack: Stack) -> bool:
    async with aiohttp.ClientSession() as session, session.get(stack.admin + "/instances/d") as response:
        return bool((await response.json())["in_flight"])


async def _still_right(stack: Stack, name: str) -> None:
    body = completion(name)
    assert (await post(stack.url, "/v1/completions", body)).text == await aggregated(body)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_one_that_leaves_before_decode_has_read_the_request(
    stack: Stack, pair: Pair, stream: bool
) -> None:
    await ready(stack)
    with pair.decode.frozen():
        async with _client(stack, completion(f"left-{stream}", stream=stream, max_tokens=200)):
            await until(lambda: _with_decode(stack))
            assert await pair.prefill.kv_usage() > 0
    await pair.prefill.freed(LEASE_S * 0.7)
    await _still_right(stack, f"after-left-{stream}")


async def test_one_that_leaves_at_any_moment(stack: Stack, pair: Pair) -> None:
    """Few find a moment that leaves it to the lease: P ends just as it is told to stop."""
    await ready(stack)
    await pair.prefill.freed(LEASE_S + 5)  # of what other tests left
    for milliseconds in range(0, 200, 4):
        async with _client(stack, completion(f"any-{milliseconds}", max_tokens=200)):
            await asyncio.sleep(milliseconds / 1000)

    async def nearly_free() -> bool:
        return await pair.prefill.kv_usage() <= 3 * HANDOFF

    await until(nearly_free, LEASE_S * 0.7)
    await _still_right(stack, "after-any")
