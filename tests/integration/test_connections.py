"""Clients' connections: what keeps them open, HTTP/1.0, WebSockets and IPv6."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.http1 import connection, post, request
from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S

MIB = 1 << 20
COMPLETION = b'{"prompt":"p","max_tokens":2}'
STREAMED = b'{"prompt":"p","max_tokens":2,"stream":true}'


# -- refusals leave the connection open


@pytest.fixture(scope="module")
def narrow(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Process]]:
    """A stack with little room for bodies, and nobody who waits."""
    stack = Stack(Path(tmp_path_factory.mktemp("narrow")))
    with spawned(stack.up({**fleet.config(), "max_held_bytes": MIB})) as process:
        yield stack, process


@pytest_asyncio.fixture
async def tight(
    session: aiohttp.ClientSession, fleet: Fleet, narrow: tuple[Stack, Process]
) -> AsyncIterator[Client]:
    client = Client(session, narrow[0], fleet)
    await ready(client, narrow[1])
    yield client
    for instance in fleet.instances:
        await client.fault(instance.id)


REFUSALS = {
    "not JSON": (400, post(b"/v1/completions", b"{")),
    "no body": (400, request(b"POST /v1/completions HTTP/1.1", b"Host: a")),
    "too deep": (400, post(b"/tokenize", b"[" * 1000)),
    "header": (400, post(b"/v1/completions", COMPLETION, b"x-pd-priority: much")),
    "P's 400": (400, post(b"/v1/completions", b'{"prompt":17}')),
    "P's 404": (404, post(b"/v1/completions", b'{"prompt":"p","model":"none"}')),
    "D's 400": (400, post(b"/v1/completions", b'{"prompt":"p","n":0}')),
    "not public": (404, post(b"/metrics", b"x" * 100_000)),
    "no such path": (404, post(b"/V1/completions", COMPLETION)),
    "by length": (413, post(b"/v1/completions", b'{"prompt":"%s"}' % (b"p" * 2 * MIB))),
    "chunked": (
        400,
        request(b"POST /v1/completions HTTP/1.1", b"Host: a", b"Transfer-Encoding: chunked")
        + b"1\r\n{\r\n0\r\n\r\n",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_refusal_leaves_the_connection_open(tight: Client, name: str) -> None:
    status, data = REFUSALS[name]
    async with connection(tight) as opened:
        for number in range(20):
            answer = await opened.ask(data)
            assert (answer.status, answer.headers.get("connection")) == (status, None), number
        assert (await opened.ask(post(b"/v1/completions", COMPLETION))).status == 200


async def test_so_does_one_for_want_of_memory(tight: Client) -> None:
    large = b'{"prompt":"%s"}' % (b"p " * (MIB // 3))
    with tight.frozen(*(instance.id for instance in tight.fleet.prefill)):
        waiting = asyncio.ensure_future(tight.post("/v1/completions", large))
        await tight.until_in_flight(1)
        async with connection(tight) as opened:
            found = [await opened.ask(post(b"/v1/completions", large)) for _ in range(3)]
    assert {answer.headers["x-pd-reason"] for answer in found} == {"memory"}
    assert {answer.status for answer in found} == {429}
    assert {answer.headers.get("connection") for answer in found} == {None}
    await waiting


async def test_what_has_not_come_whole_ends_it(client: Client) -> None:
    """Envoy cannot tell where the next request would begin."""
    async with connection(client) as opened:
        head = request(b"POST /v1/completions HTTP/1.1", b"Host: a", b"Content-Length: %d" % (65 * MIB))
        answer = await opened.ask(head + b"p" * (64 * MIB + 1))
        assert (answer.status, answer.headers["connection"]) == (413, "close")


# -- HTTP/1.0

OLD = b"HTTP/1.0"


async def test_http_1_0(client: Client) -> None:
    """As nginx asks its upstreams, and `ab`."""
    expected = (await client.post("/v1/completions", json.loads(COMPLETION))).text
    for headers in ([], [b"Connection: close"], [b"User-Agent: ApacheBench/2.3", b"Accept: */*"]):
        async with connection(client) as opened:
            answer = await opened.ask(post(b"/v1/completions", COMPLETION, *headers, version=OLD))
            assert (answer.text, answer.headers["connection"]) == (expected, "close")
            assert answer.headers["x-pd-prefill"]
            assert await opened.ended()


async def test_http_1_0_on_one_connection(client: Client) -> None:
    async with connection(client) as opened:
        for body, status in [(COMPLETION, 200), (b"{", 400), (COMPLETION, 200)]:
            answer = await opened.ask(post(b"/v1/completions", body, b"Connection: Keep-Alive", version=OLD))
            assert (answer.status, answer.headers["connection"]) == (status, "keep-alive")


@pytest.mark.parametrize("headers", [(), (b"Connection: Keep-Alive",)], ids=["plain", "keep-alive"])
async def test_http_1_0_streamed(client: Client, headers: tuple[bytes, ...]) -> None:
    """The end of the connection is the end of the stream: HTTP/1.0 knows no chunks."""
    expected = (await client.post("/v1/completions", json.loads(STREAMED))).text
    async with connection(client) as opened:
        answer = await opened.ask(post(b"/v1/completions", STREAMED, *headers, version=OLD))
        assert "transfer-encoding" not in answer.headers
        assert answer.text == expected


async def test_http_1_0_without_a_host(client: Client) -> None:
    """As some load balancers check health."""
    for path, status in [(b"/health", 200), (b"/v1/models", 200), (b"/metrics", 404)]:
        async with connection(client) as opened:
            answer = await opened.ask(request(b"GET %s HTTP/1.0" % path))
            assert (answer.status, answer.headers["connection"]) == (status, "close")


# -- WebSockets


async def test_a_websocket_passes_to_decode_and_is_in_flight_until_it_is_closed(client: Client) -> None:
    url = f"{client.stack.url}/v1/realtime?model=m"
    async with client.session.ws_connect(url, headers={"x-request-id": "spoken"}) as socket:
        assert (await socket.receive_json(timeout=HUNG_S))["type"] == "session.created"
        for text in ("", "a", "b" * 100_000):
            await socket.send_str(text)
            assert await socket.receive_str(timeout=HUNG_S) == text
        assert await client.in_flight() == 1
        busy = [
            each["id"]
            for each in (await client.admin("GET", "/instances"))[1]["instances"]
            if each["in_flight"]
        ]
    assert len(busy) == 1
    assert (await client.seen(busy[0]))[-1]["path"] == "/v1/realtime"
    await client.until_in_flight(0)


def upgrade(path: bytes) -> bytes:
    """Return what asks for a WebSocket, spelled as browsers do."""
    headers = (b"Host: a", b"Connection: keep-alive, Upgrade", b"Upgrade: WebSocket")
    key = (b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    return request(b"GET %s HTTP/1.1" % path, *headers, *key)


async def test_a_websocket_whose_client_vanishes(client: Client) -> None:
    async with connection(client) as opened:
        assert (await opened.ask(upgrade(b"/v1/realtime"))).status == 101
        assert await client.in_flight() == 1
        opened.writer.transport.abort()
    await client.until_in_flight(0)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics", "/v1/realtime/"]
)
async def test_no_other_path_is_upgraded(client: Client, path: str) -> None:
    before = await client.seen_by_all()
    async with connection(client) as opened:
        answer = await opened.ask(upgrade(path.encode()))
    assert (answer.status, answer.headers["connection"]) == (403, "close")
    assert await client.seen_by_all() == before


async def test_websockets_without_the_scheduler(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    stack = Stack(tmp_path)
    client = Client(session, stack, fleet)
    with spawned(stack.envoy()) as envoy:
        with spawned(stack.serve(fleet.config())) as scheduler:
            await ready(client, envoy)
            await client.until_known()
            async with session.ws_connect(stack.url + "/v1/realtime") as socket:
                await socket.receive_json(timeout=HUNG_S)
                scheduler.process.kill()
                await asyncio.to_thread(scheduler.wait)
                await socket.send_str("still there")
                assert await socket.receive_str(timeout=HUNG_S) == "still there"
        async with session.ws_connect(stack.url + "/v1/realtime") as socket:
            assert (await socket.receive_json(timeout=HUNG_S))["type"] == "session.created"


# -- IPv6


async def test_an_ingress_for_both_families(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    stack = Stack(tmp_path)
    with spawned([*stack.up(fleet.config()), "--host=::"]) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        for host in ("::1", "127.0.0.1"):
            async with connection(client, host) as opened:
                assert (await opened.ask(post(b"/v1/completions", COMPLETION))).status == 200
