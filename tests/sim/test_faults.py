"""Faults that a test can ask a simulated engine for."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.support.sim import BODY, COMPLETIONS, Client
from tests.support.sim_fleet import Fleet, SimInstance
from tests.support.waiting import until


@asynccontextmanager
async def fault(client: Client, instance: SimInstance, **fault: Any) -> AsyncIterator[None]:
    await client.post(instance, "/_sim/fault", fault)
    assert client.status == 200
    try:
        yield
    finally:
        await client.post(instance, "/_sim/fault", {})


async def test_fault_status(fleet: Fleet, client: Client) -> None:
    d = fleet["decode-0"]
    async with fault(client, d, status=503, times=1):
        answer = await client.post(d, COMPLETIONS, BODY)
        assert (client.status, answer["error"]["code"]) == (503, 503)
        await client.text(d, BODY)


async def test_fault_delay_and_health(fleet: Fleet, client: Client) -> None:
    d = fleet["decode-0"]
    async with fault(client, d, delay=30, health=500):
        await client.get(d, "/health")
        assert client.status == 500
        before = len(await client.get(d, "/_sim/requests"))
        request = asyncio.create_task(Client(client.session).text(d, BODY))

        async def received() -> bool:
            return len(await client.get(d, "/_sim/requests")) > before

        await until(received)
        assert (await client.stats(d))["running"] == 0
        request.cancel()
    await client.get(d, "/health")
    assert client.status == 200


async def test_fault_reset(fleet: Fleet, client: Client) -> None:
    d = fleet["decode-0"]
    async with fault(client, d, reset=True):
        with pytest.raises((aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)):
            await client.post(d, COMPLETIONS, BODY)


@pytest.mark.parametrize("stream", [False, True])
async def test_fault_half(fleet: Fleet, client: Client, stream: bool) -> None:
    d = fleet["decode-0"]
    post = client.session.post(d.url + COMPLETIONS, json={**BODY, "stream": stream})
    async with fault(client, d, half=True), post as response:
        assert response.status == 200
        assert await response.content.readany()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()

    async def rest() -> bool:
        return (await client.stats(d))["running"] == 0

    await until(rest)


async def test_an_unknown_fault_is_refused(fleet: Fleet, client: Client) -> None:
    await client.post(fleet["decode-0"], "/_sim/fault", {"statsu": 1})
    assert client.status == 400


async def test_the_journal_holds_requests_as_they_came(fleet: Fleet, client: Client) -> None:
    await client.post(fleet["decode-0"], COMPLETIONS, {"prompt": "你好", "max_tokens": 1}, X_Mark="7")
    entry = await client.last(fleet["decode-0"])
    assert (entry["method"], entry["path"], entry["headers"]["X_Mark"]) == ("POST", COMPLETIONS, "7")
    assert json.loads(entry["body"])["prompt"] == "你好"
    await client.get(fleet["decode-0"], "/health")
    assert await client.last(fleet["decode-0"]) == entry


async def test_what_comes_wrong_stays_wrong_in_the_cache(fleet: Fleet, client: Client) -> None:
    """As in vLLM: what was fetched is cached like what was computed, each salt's apart."""
    p, d = fleet["prefill-0"], fleet["decode-0"]
    body = {**BODY, "prompt": "garbled " * 40, "cache_salt": "a"}
    right = await client.text(d, {**body, "cache_salt": "b"})
    asked = {**body, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    answer = await client.post(p, COMPLETIONS, asked)
    async with fault(client, d, garbled=[p.port]):
        split = {**body, "kv_transfer_params": answer["kv_transfer_params"]}
        assert await client.text(d, split) != right
    assert await client.text(d, body) != right
    assert await client.text(d, {**body, "cache_salt": "c"}) == right
