"""Hand-offs of a real P that are held up, given up or orphaned. Its lease is 3 s; two P and two D.

``p`` and ``d`` are the pair with the short lease, and the tests end them: what kills comes last.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import Answer, Stack, spawned
from tests.support.real_vllm import Instance, Pair, aggregated, completion, post, ready, steer
from tests.support.waiting import until

pytestmark = pytest.mark.vllm

LEASE_S = 3


@pytest.fixture(scope="module")
def stack(pair: Pair, short_lease: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    config = {
        "strategy": "round_robin",
        "kv_lease_duration": LEASE_S,
        "prefill_instances": [short_lease.prefill.entry("p"), pair.prefill.entry("other-p")],
        "decode_instances": [short_lease.decode.entry("d"), pair.decode.entry("other-d")],
        "ejection_failures": 1_000_000,
        "ejection_success_rate": 0.0,
        "health_check_interval": 60.0,  # what happens in between is for requests to find out
    }
    with spawned(stack.up(config)):
        yield stack


async def instance(stack: Stack, name: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{stack.admin}/instances/{name}") as response:
        return dict(await response.json())


async def use(stack: Stack, name: str, drained: str) -> None:
    """Have one of two P prefill, and not the other."""
    await steer(stack, name, "undrain")
    await steer(stack, drained, "drain")


async def held(stack: Stack, body: dict[str, Any]) -> asyncio.Task[Answer]:
    """Send a request until one is with ``d``, which is frozen, after its prefill."""
    before = (await instance(stack, "d"))["in_flight"]
    while True:
        task = asyncio.ensure_future(post(stack.url, "/v1/completions", body))

        async def there(task: asyncio.Task[Answer] = task) -> bool:
            return task.done() or (await instance(stack, "d"))["in_flight"] > before

        await until(there)
        if not task.done():
            return task


async def expired(prefill: Instance, name: str) -> None:
    """Wait until P's lease has ended, then have other prompts take its blocks."""
    await prefill.freed(LEASE_S + 2)
    for number in range(20):
        await post(prefill.url, "/v1/completions", completion(f"{name}-other-{number}", max_tokens=1))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_hand_off_that_is_held_up_beyond_the_lease(
    stack: Stack, short_lease: Pair, stream: bool
) -> None:
    """Another D answers in time; and ``d``, when it wakes up, does not keep what it may have fetched."""
    await ready(stack)
    await use(stack, "p", drained="other-p")
    body = completion(f"late-{stream}")
    expected = await aggregated(body)
    with short_lease.decode.frozen():
        task = await held(stack, {**body, "stream": stream})
        assert await short_lease.prefill.kv_usage() > 0
        await expired(short_lease.prefill, f"late-{stream}")
    answer = await task
    assert answer.text == expected
    assert answer.headers["x-pd-decode"] == "other-d"
    assert "x-pd-prefill" not in answer.headers
    await ready(stack)
    assert (await post(short_lease.decode.url, "/v1/completions", body)).text == expected


async def test_a_late_hand_off_is_a_wrong_text(short_lease: Pair) -> None:
    """What the test above would see if one were used."""
    body = completion("control")
    expected = await aggregated(body)
    asked: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
    asked |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    prefill = {**body, "max_tokens": 1, "kv_transfer_params": asked}
    prefilled = await post(short_lease.prefill.url, "/v1/completions", prefill)
    await expired(short_lease.prefill, "control")
    late = {**body, "kv_transfer_params": prefilled.json["kv_transfer_params"]}
    assert (await post(short_lease.decode.url, "/v1/completions", late)).text != expected


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_one_that_waits_in_decodes_own_queue(stack: Stack, short_lease: Pair, stream: bool) -> None:
    """vLLM's D keeps the lease alive for what it has queued."""
    await ready(stack)
    await use(stack, "p", drained="other-p")
    # So many tokens that an answer in one piece may take longer than the lease.
    body = completion(f"queued-{stream}", stream=stream, max_tokens=40)
    expected = await aggregated(body)
    decode = short_lease.decode
    for _ in range(4):  # round robin takes the other D in between
        ahead = [
            asyncio.ensure_future(
                post(decode.url, "/v1/completions", completion(f"{stream}-{n}", max_tokens=1300))
            )
            for n in range(2)  # as many as it takes
        ]
        before, start = await decode.transferred(), time.monotonic()
        answer = await post(stack.url, "/v1/completions", body)
        took = time.monotonic() - start
        for each in ahead:
            each.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)
        assert answer.text == expected
        if answer.headers["x-pd-decode"] == "d":
            break
    assert took > LEASE_S
    assert answer.headers["x-pd-prefill"] == "p"
    assert await decode.transferred() > before


async def test_a_prefill_instance_that_dies_after_its_answer(stack: Stack, short_lease: Pair) -> None:
    await ready(stack)
    await use(stack, "p", drained="other-p")
    bodies = [completion(f"orphan-{stream}", stream=stream) for stream in (False, True)]
    expected = [await aggregated(body) for body in bodies]
    with short_lease.decode.frozen():
        tasks = [await held(stack, body) for body in bodies]
        short_lease.prefill.signal(signal.SIGKILL)
    answers = [await task for task in tasks]
    assert [answer.text for answer in answers] == expected


async def test_a_prefill_instance_that_is_gone(stack: Stack) -> None:
    """It refuses connections and nobody has noticed: the other P prefills, and without that D itself."""
    await steer(stack, "other-p", "undrain")
    for drained in (False, True):
        if drained:
            await use(stack, "p", drained="other-p")
        for number in range(2):
            body = completion(f"gone-{drained}-{number}", stream=bool(number))
            expected = await aggregated(body)
            answer = await post(stack.url, "/v1/completions", body)
            assert answer.text == expected
            assert answer.headers.get("x-pd-prefill") == (None if drained else "other-p")


async def test_a_decode_instance_that_dies_before_the_first_byte(
    stack: Stack, pair: Pair, short_lease: Pair
) -> None:
    await use(stack, "other-p", drained="p")
    bodies = [completion(f"killed-{stream}", stream=stream) for stream in (False, True)]
    expected = [await aggregated(body) for body in bodies]
    with short_lease.decode.frozen():
        tasks = [await held(stack, body) for body in bodies]
        assert await pair.prefill.kv_usage() > 0
        short_lease.decode.signal(signal.SIGKILL)
        answers = [await task for task in tasks]
    assert [answer.text for answer in answers] == expected
    for answer in answers:
        assert answer.headers["x-pd-decode"] == "other-d"
        assert "x-pd-prefill" not in answer.headers
    await pair.prefill.freed(20)  # by the release: its lease is 30 s
