"""The self-check on a real vLLM pair: salts keep D's cache out of it, and its hand-offs are used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import Stack, spawned
from tests.support.real_vllm import Pair, ready

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    config = {"prefill_instances": [pair.prefill.entry("p")], "decode_instances": [pair.decode.entry("d")]}
    with spawned(stack.up(config)):
        yield stack


async def test_both_answers_are_equal(stack: Stack, pair: Pair) -> None:
    await ready(stack)
    async with aiohttp.ClientSession() as session:
        for _ in range(5):
            before = await pair.decode.transferred()
            async with session.post(stack.admin + "/self-check") as response:
                (one,) = (await response.json())["checks"]
            assert (one["result"], one["tries"]) == ("match", 1), one
            assert await pair.decode.transferred() - before > 100
    await pair.prefill.freed(20)
