"""Other connectors than NIXL that pulls, on a real vLLM pair: the text is an aggregated instance's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import Answer, Stack, spawned
from tests.support.real_vllm import AGGREGATED, Pair, completion, post, ready
from tests.support.vllm_answers import found
from tests.support.waiting import until

pytestmark = pytest.mark.vllm

PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}


def body_of(kind: str, name: str, **more: Any) -> dict[str, Any]:
    """A request of one of the kinds of :data:`PATHS`, whose prompt nobody had before."""
    body = completion(name, max_tokens=24, **more)
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    return body


async def with_id(stack: Stack, path: str, body: dict[str, Any], name: str) -> Answer:
    """Send a request under an id of the client's."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            stack.url + path, json={"model": "tiny", **body}, headers={"x-request-id": name}
        ) as answer,
    ):
        headers = {key.lower(): value for key, value in answer.headers.items()}
        return Answer(answer.status, headers, await answer.read())


def _up(stack: Stack, pair: Pair, connector: str) -> dict[str, Any]:
    instances = {"prefill_instances": [pair.prefill.entry("p")], "decode_instances": [pair.decode.entry("d")]}
    return {**instances, "connector": connector}


@pytest.fixture(scope="module", params=["nixl-push", "auto"])
def push_stack(
    push_pair: Pair, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    with spawned(stack.up(_up(stack, push_pair, request.param))):
        yield stack


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", PATHS)
async def test_the_text_is_right_though_all_have_one_id(
    push_stack: Stack, push_pair: Pair, kind: str, stream: bool
) -> None:
    await ready(push_stack)
    bodies = [body_of(kind, f"push-{stream}-{n}-{push_stack.admin_port}", stream=stream) for n in range(3)]
    expected = [(await post(AGGREGATED, PATHS[kind], body)).text for body in bodies]
    before = await push_pair.decode.transferred()
    answers = await asyncio.gather(*(with_id(push_stack, PATHS[kind], body, "one") for body in bodies))
    assert [answer.text for answer in answers] == expected
    for answer in answers:
        assert answer.headers["x-request-id"] == "one"
        assert answer.headers["x-pd-prefill"] == "p"

    async def risen() -> bool:
        return await push_pair.decode.transferred() - before > 600

    await until(risen)
    await push_pair.prefill.freed(10)


@pytest.mark.parametrize("kind", PATHS)
async def test_what_nobody_uses_is_freed(push_stack: Stack, push_pair: Pair, kind: str) -> None:
    """Long before its lease, 30 s, ends."""
    await ready(push_stack)
    with push_pair.decode.frozen():
        body = body_of(kind, f"left-{kind}-{push_stack.admin_port}")
        left = asyncio.ensure_future(post(push_stack.url, PATHS[kind], body))

        async def there() -> bool:
            async with (
                aiohttp.ClientSession() as session,
                session.get(push_stack.admin + "/instances/d") as found,
            ):
                return bool((await found.json())["in_flight"])

        await until(there)
        assert await push_pair.prefill.kv_usage() > 0
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
    await push_pair.prefill.freed(20)
    body = body_of(kind, f"after-{kind}-{push_stack.admin_port}")
    expected = await post(AGGREGATED, PATHS[kind], body)
    assert (await post(push_stack.url, PATHS[kind], body)).text == expected.text


@pytest.fixture(scope="module")
def store_stack(store_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    with spawned(stack.up(_up(stack, store_pair, "shared-store"))):
        yield stack


@pytest.mark.parametrize("kind", PATHS)
async def test_the_text_is_right_and_p_has_computed_it(
    store_stack: Stack, store_pair: Pair, kind: str
) -> None:
    await ready(store_stack)
    body = body_of(kind, f"store-{kind}")
    expected = await post(AGGREGATED, PATHS[kind], body)
    before = await store_pair.decode.transferred()
    answer = await post(store_stack.url, PATHS[kind], body)
    assert answer.text == expected.text
    assert answer.headers["x-pd-prefill"] == "p"

    async def risen() -> bool:
        return await store_pair.decode.transferred() - before > 200

    await until(risen)


@pytest.mark.parametrize("kind", PATHS)
async def test_what_p_had_cached_is_in_a_header(store_stack: Stack, kind: str) -> None:
    """D counts what it has read from the store, which an engine alone would have computed."""
    await ready(store_stack)
    body = body_of(kind, f"header-{kind}")
    first, second = [await post(store_stack.url, PATHS[kind], body) for _ in range(2)]
    assert first.headers["x-pd-cached-tokens"] == "0"
    assert max(found(first.json, "cached_tokens")) > 200
    assert int(second.headers["x-pd-cached-tokens"]) > 200


@pytest.mark.parametrize("kind", PATHS)
async def test_usage_says_what_p_had_cached(push_stack: Stack, kind: str) -> None:
    await ready(push_stack)
    body = body_of(kind, f"usage-{kind}-{push_stack.admin_port}")
    first, second = [await post(push_stack.url, PATHS[kind], body) for _ in range(2)]
    assert "x-pd-prefill" in first.headers
    assert "x-pd-cached-tokens" not in first.headers
    assert found(first.json, "cached_tokens") == [0]
    assert max(found(second.json, "cached_tokens")) > 200


@pytest.fixture(scope="module", params=[True, False], ids=["once", "twice"])
def once_stack(
    pair: Pair, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Stack, bool]]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    config = {**_up(stack, pair, "auto"), "tokenize_once": request.param}
    with spawned(stack.up(config)):
        yield stack, request.param


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_text_is_the_same(once_stack: tuple[Stack, bool], pair: Pair, stream: bool) -> None:
    at, once = once_stack
    await ready(at)
    for number in range(3):
        body = body_of("chat", f"once-{once}-{stream}-{number}", stream=stream)
        body["messages"] *= 4
        expected = await post(AGGREGATED, PATHS["chat"], {**body, "stream": False})
        answer = await post(at.url, PATHS["chat"], body)
        assert answer.text == expected.text
        assert answer.headers["x-pd-prefill"] == "p"


async def test_d_reads_the_tokens_and_nothing_else(pair: Pair) -> None:
    """With tokens of another chat in the hand-off, D answers that one: it has not looked at the messages."""
    chat, other = (body_of("chat", name) for name in ("looked-at", "not-looked-at"))
    asked: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
    prefill = {**chat, "max_tokens": 1, "return_token_ids": True, "kv_transfer_params": asked}
    prefilled = (await post(pair.prefill.url, PATHS["chat"], prefill)).json
    params = {**prefilled["kv_transfer_params"], "prompt_token_ids": prefilled["prompt_token_ids"]}
    decode = {**other, "kv_transfer_params": params}
    expected = await post(AGGREGATED, PATHS["chat"], chat)
    assert (await post(pair.decode.url, PATHS["chat"], decode)).text == expected.text


async def test_a_consumer_prefills_by_itself(pair: Pair) -> None:
    body = completion("consumer")
    expected = await post(AGGREGATED, "/v1/completions", body)
    assert (await post(pair.decode.url, "/v1/completions", body)).text == expected.text
