"""Which paths pass, however they are spelled: with the scheduler and without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.http1 import connection, post, request
from tests.support.processes import Answer, Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until

COMPLETION = b'{"prompt":"p","max_tokens":2}'
CHAT = b'{"messages":[{"role":"user","content":"p"}],"max_tokens":2}'
STEERING = b'{"prompt":"p","max_tokens":2,"kv_transfer_params":{"do_remote_prefill":true}}'

SPLIT = {
    b"/v1/completions": COMPLETION,
    b"/v1/completions?": COMPLETION,
    b"/v1/completions?a=/v1/models": COMPLETION,
    b"//v1/completions": COMPLETION,
    b"/v1///completions": COMPLETION,
    b"/v1%2F%2Fcompletions": COMPLETION,
    b"/v1\\completions": COMPLETION,
    b"/v1/./completions": COMPLETION,
    b"/v1/%2e/completions": COMPLETION,
    b"/v1/chat/../completions": COMPLETION,
    b"/v1/chat/%2E%2e/completions": COMPLETION,
    b"/v1/models/..%2fcompletions": COMPLETION,
    b"/%2e%2e/v1/completions": COMPLETION,
    b"/%76%31/completions": COMPLETION,
    b"http://a/v1/completions": COMPLETION,
    b"HTTP://a//v1/completions": COMPLETION,
    b"/v1/chat/completions": CHAT,
    b"/v1/chat%2Fcompletions": CHAT,
    b"/v1%2fchat%2fcompletions": CHAT,
    b"/v1/chat%5Ccompletions": CHAT,
    b"/v1/chat/%63ompletions": CHAT,
    b"/%76%31%2f%63%68at/completions": CHAT,
    b"http://a/v1/chat%2Fcompletions": CHAT,
}
"""Spellings of the paths that are split."""

REFUSED = (
    b"/V1/completions",
    b"/v1/Completions",
    b"/v1/chat/COMPLETIONS",
    b"/v1/completions;a=b",
    b"/v1;a/completions",
    b"/v1/completions%20",
    b"/v1/completions%3Fa",
    b"/v1/completions%23a",
    b"/v1/completions%3ba",
    b"/v1/completions%00",
    b"/v1/completions%0d%0a",
    b"/v1/completions#a",
    b"/v1/completions?a#b",
    b"/v1%252Fcompletions",
    b"/v1/%252e/completions",
    b"/v1/chat/%2563ompletions",
    b"/v1/completions%c0%af",
    b"/v1/completion%EF%BD%93",
    b"/v1/c%6fmpletions%",
    b"/v1/comp%GGletions",
    b"/x?/../v1/completions",
    b"/v1/completions\x7f",
    b"/v1/comple\tions",
    b"v1/completions",
    b"*",
    b"http://a",
    b"http:///v1/completions",
    b"https://a/v1/completions",
    b"/v1/completions/render",
    b"/invocations",
)

SLASHES = (
    b"/v1/completions/",
    b"/v1/completions//",
    b"/v1/completions%2f",
    b"/v1/completions/.",
    b"/v1/completions/x/..",
)

ENGINE_ONLY = (
    *(
        b"/",
        b"/metrics",
        b"/metrics/",
        b"//metrics",
        b"/%6detrics",
        b"/metrics?a",
        b"/Metrics",
        b"/load",
        b"/docs",
    ),
    *(
        b"/server_info",
        b"/is_sleeping",
        b"/openapi.json",
        b"/kv_event_sources",
        b"/_sim/stats",
        b"/_sim%2Fstats",
    ),
)


async def sent(client: Client, path: bytes, body: bytes) -> tuple[Answer, int]:
    """Return the answer to a POST, and how many requests reached instances for it."""
    before = await client.seen_by_all()
    async with connection(client) as opened:
        answer = await opened.ask(post(path, body, b"Connection: close"))
    found = [each for name, number in before.items() for each in await client.seen_since(name, number)]
    return answer, len(found)


@pytest.mark.parametrize("path", SPLIT, ids=bytes.decode)
async def test_every_spelling_is_split(client: Client, path: bytes) -> None:
    answer, seen = await sent(client, path, SPLIT[path])
    assert (answer.status, seen) == (200, 2)
    assert answer.headers["x-pd-prefill"]
    (last, *_) = reversed(await client.seen(answer.headers["x-pd-decode"]))
    assert last["path"] in ("/v1/completions", "/v1/chat/completions")


@pytest.mark.parametrize("path", REFUSED, ids=repr)
async def test_what_is_no_spelling_reaches_no_instance(client: Client, path: bytes) -> None:
    answer, seen = await sent(client, path, COMPLETION)
    assert answer.status in (400, 403, 404)
    assert answer.error["message"]
    assert seen == 0


@pytest.mark.parametrize("path", SLASHES, ids=bytes.decode)
async def test_a_slash_too_many_leads_to_the_path_without_it(client: Client, path: bytes) -> None:
    answer, seen = await sent(client, path + b"?a=b", COMPLETION)
    assert (answer.status, seen) == (307, 0)
    assert answer.headers["location"] == "http://a/v1/completions?a=b"


async def test_a_client_follows_there(client: Client) -> None:
    answer = await client.complete()
    slash = await client.post("/v1/completions/", {"prompt": "Where is the cache?", "max_tokens": 8})
    assert (slash.status, slash.text) == (200, answer.text)
    assert slash.headers["x-pd-prefill"]


@pytest.mark.parametrize("path", ENGINE_ONLY, ids=bytes.decode)
async def test_what_is_for_who_runs_an_instance(client: Client, path: bytes) -> None:
    async with connection(client) as opened:
        for method in (b"GET", b"POST", b"OPTIONS"):
            answer = await opened.ask(request(b"%s %s HTTP/1.1" % (method, path), b"Host: a"))
            if answer.status == 307:
                continue
            assert (answer.status, answer.error["type"]) == (404, "NotFoundError")
            assert answer.headers["x-pd-reason"] == "not_public"
            assert "x-pd-decode" not in answer.headers


async def test_what_is_for_clients(client: Client) -> None:
    for path in ("/v1/models", "/version"):
        assert (await client.send("GET", path)).status == 200
    for path in ("/v1/embeddings", "/tokenize"):
        assert (await client.post(path, {"prompt": "p", "input": "p"})).status == 200


async def test_a_list_of_an_operators_own(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    """It holds in the scheduler, behind an Envoy that does not know it, and in an Envoy of its own."""
    stack = Stack(tmp_path)
    settings = {**fleet.config(), "public_paths": ["/load", "/v1/responses/*"]}
    with spawned(stack.up(settings)) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        assert (await client.send("GET", "/load")).json == {"server_load": 0}
        assert (await client.complete()).status == 200
        for path in ("/v1/models", "/v1/responses/a/b", "/v1/realtime", "/metrics"):
            assert (await client.send("GET", path)).headers["x-pd-reason"] == "not_public"
    with spawned(stack.envoy()) as envoy, spawned(stack.serve(settings)):
        await ready(client, envoy)
        await until(lambda: _answered(client, "/v1/models", 404))
        assert (await client.complete()).status == 200


async def _answered(client: Client, path: str, status: int) -> bool:
    return (await client.send("GET", path)).status == status


# -- without the scheduler


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    """A client of an Envoy whose scheduler has gone."""
    stack = Stack(Path(tmp_path_factory.mktemp("alone")))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HUNG_S)) as session:
        client = Client(session, stack, fleet)
        with spawned(stack.envoy()) as envoy:
            with spawned(stack.serve(fleet.config())) as scheduler:
                await ready(client, envoy)
                await client.until_known()
                scheduler.process.kill()
                await asyncio.to_thread(scheduler.wait)
            yield client


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", SPLIT, ids=bytes.decode)
async def test_alone_no_spelling_lets_a_hand_off_pass(alone: Client, path: bytes) -> None:
    answer, seen = await sent(alone, path, STEERING)
    assert (answer.status, seen) == (400, 0)
    assert "kv_transfer_params" in answer.error["message"]
    answer, seen = await sent(alone, path, SPLIT[path])
    assert (answer.status, seen) == (200, 1)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", REFUSED, ids=repr)
async def test_alone_what_is_no_spelling_reaches_no_instance(alone: Client, path: bytes) -> None:
    answer, seen = await sent(alone, path, COMPLETION)
    assert answer.status in (400, 403, 404)
    assert seen == 0


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", ENGINE_ONLY, ids=bytes.decode)
async def test_alone_what_is_for_who_runs_an_instance(alone: Client, path: bytes) -> None:
    async with connection(alone) as opened:
        answer = await opened.ask(request(b"GET %s HTTP/1.1" % path, b"Host: a"))
        assert answer.status in (307, 404)
