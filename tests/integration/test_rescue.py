"""A decode instance that fails before the first byte: another one answers, without the hand-off."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S

PROMPT = "A hand-off is used once; a second use gives a wrong text. " * 8


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"reset": True}])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
async def test_another_decode_instance_answers(
    client: Client, chat: bool, stream: bool, fault: dict[str, Any]
) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    content: dict[str, Any] = (
        {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    )
    body = {**content, "max_tokens": 12, "stream": stream, "x_unknown": [1.50]}
    expected = (await client.post(path, body)).text
    await client.fault("decode-0", **fault)
    first_attempts = second_attempts = 0
    async with asyncio.timeout(HUNG_S):
        while not (
            first_attempts and second_attempts
        ):  # one that says that it is full is left alone for a while
            answer = await client.post(path, body)
            assert answer.text == expected
            assert answer.headers["x-pd-decode"] == "decode-1"
            seen = await client.request_of(answer)
            if "x-pd-prefill" in answer.headers:
                assert (seen["hand_off"], seen["outcomes"]) == ("receive", ["good"])
                first_attempts += 1
            else:
                second_attempts += 1
                assert (seen["hand_off"], json.loads(seen["body"])) == (None, body)


async def test_large_bodies_and_many_at_once(client: Client) -> None:
    """The filter may have to wait for the body, and must not leave a wrong content-length then."""
    body = {"prompt": PROMPT, "max_tokens": 12, "padding": "x" * 2_000_000}
    expected = (await client.post("/v1/completions", body)).text
    await client.fault("decode-0", reset=True)
    answers = await asyncio.gather(*(client.post("/v1/completions", body) for _ in range(12)))
    assert {(answer.status, answer.text) for answer in answers} == {(200, expected)}


async def assert_second_500(client: Client, stream: bool) -> None:
    """Both D answer 500: each is tried once, and the client gets what the second has said."""
    for instance in client.fleet.decode:
        await client.fault(instance.id, status=500)
    answer = await client.complete(stream=stream)
    for instance in client.fleet.decode:
        seen = [set(each["headers"].values()) for each in await client.seen(instance.id)]
        assert sum(answer.headers["x-request-id"] in values for values in seen) == 1
    own = client.fleet[answer.headers["x-pd-decode"]].url + "/v1/completions"
    async with client.session.post(own, json={"prompt": "p"}) as response:
        assert (answer.status, answer.json) == (500, await response.json())
    assert "x-envoy-ratelimited" not in answer.headers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_second_500_is_the_clients_as_its_instance_wrote_it(client: Client, stream: bool) -> None:
    await assert_second_500(client, stream)


async def test_so_it_is_without_the_scheduler(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    client = Client(session, Stack(tmp_path), fleet)
    with spawned(client.stack.serve(fleet.config())) as scheduler, spawned(client.stack.envoy()) as envoy:
        await ready(client, envoy)
        await client.until_known()
        scheduler.process.kill()
        await asyncio.to_thread(scheduler.wait)
        await assert_second_500(client, stream=False)
    for instance in fleet.decode:
        await client.fault(instance.id)


async def test_when_two_decode_instances_lose_a_request_the_client_gets_an_error(client: Client) -> None:
    for instance in client.fleet.decode:
        await client.fault(instance.id, reset=True)
    answer = await client.complete()
    assert answer.status == 503
    assert "Two instances" in answer.error["message"]


async def test_other_paths_are_tried_once(client: Client) -> None:
    """They may have effects, and the instance may have had them before it failed."""
    for instance in client.fleet.decode:
        await client.fault(instance.id, status=500, paths=["/v1/embeddings"])
    before = await client.seen_by_all()
    assert (await client.post("/v1/embeddings", {"input": "x"})).status == 500
    seen = [one["path"] for name, number in before.items() for one in await client.seen_since(name, number)]
    assert seen == ["/v1/embeddings"]
