"""What clients can send to get past Envoy or the scheduler: nesting, headers that steer, smuggling."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.support.processes import Answer, Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.request.json_text import MAX_DEPTH

# -- limits


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/embeddings"])
@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 300, 900, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
async def test_depth(client: Client, path: str, depth: int, brackets: str) -> None:
    opening = "[" if brackets == "[]" else '{"a":'
    text = '{"messages":[{"role":"user","content":"p"}],"prompt":"p","input":"p","max_tokens":2,"x":%s}'
    nested = opening * (depth - 1) + "1" + brackets[1] * (depth - 1)
    before = await client.seen_by_all()
    answer = await client.post(path, (text % nested).encode())
    if depth <= MAX_DEPTH:
        assert answer.status == 200
        return
    assert (answer.status, answer.error["type"]) == (400, "BadRequestError")
    assert "too deeply" in answer.error["message"]
    assert await client.seen_by_all() == before


@pytest.mark.parametrize("headers", [{"x-long": "a" * 70_000}, {f"x-{n}": "a" for n in range(120)}])
async def test_too_many_headers(client: Client, headers: dict[str, str]) -> None:
    answer = await client.post("/v1/completions", {"prompt": "p"}, headers)
    assert (answer.status, answer.error["type"]) == (431, "BadRequestError")


async def test_headers_that_fit(client: Client) -> None:
    headers = {f"x-{n}": "a" * 8_000 for n in range(7)}
    answer = await client.post("/v1/completions", {"prompt": "p", "max_tokens": 2}, headers)
    assert answer.status == 200
    assert answer.headers["x-pd-prefill"]


async def test_header_values_that_are_no_text(client: Client) -> None:
    """They reach decode as they are; prefill can do without."""
    answers, seen = await exchange(client, post(b"traceparent: " + b"\xff" * 3000, LENGTH, body=BODY))
    assert answers[0].status == 200
    legs = [each["headers"].get("traceparent") for each in _of_first(seen)]
    assert sorted(legs, key=bool) == [None, "\udcff" * 3000]


# -- logs


async def test_nothing_secret_is_logged(session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    config = {**fleet.config(), "admin_token": {"env": "ADMIN_TOKEN"}}
    command = [*stack.up(config), "--log-level=DEBUG"]
    with spawned(command, ADMIN_TOKEN="s3cret-token", GRPC_VERBOSITY="info") as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        headers = {
            "authorization": "Bearer s3cret",
            "cookie": "s3cret",
            "x-pd-id": "s3cret",
            "x-any": "s3cret",
        }
        chat = {"messages": [{"role": "user", "content": "s3cret"}], "s3cret": "s3cret", "user": "s3cret"}
        for body in (chat, {**chat, "n": 2}, {**chat, "messages": "s3cret"}, b'{"s3cret', b"s3cret"):
            for path in ("/v1/chat/completions?key=s3cret", "/v1/embeddings?key=s3cret"):
                await client.post(path, body, headers)
        for instance in fleet.instances:  # what fails is logged with a reason
            await client.fault(instance.id, status=500)
        await client.post("/v1/chat/completions", {**chat, "kv_transfer_params": {"s3cret": 1}}, headers)
        for instance in fleet.instances:
            await client.fault(instance.id)
        for token in ("s3cret-token", "s3cret-wrong"):
            url = f"{stack.admin}/instances/decode-0"
            async with session.get(url, headers={"authorization": f"Bearer {token}"}) as response:
                assert response.status == (200 if token == "s3cret-token" else 401)
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
        assert "/v1/chat/completions" in process.output, "there is a log"
        assert "s3cret" not in process.output


# -- x-envoy-*

STEERING = {
    "x-envoy-retry-on": "5xx,retriable-4xx,retriable-headers",
    "x-envoy-retriable-header-names": "x-request-id",
    "x-envoy-max-retries": "50",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-upstream-rq-per-try-timeout-ms": "1",
    "x-envoy-attempt-count": "77",
    "x-envoy-hedge-on-per-try-timeout": "true",
    "X-Envoy-Original-Path": "/evil",
    "x-envoy-external-address": "77.77.77.77",
    "x-envoy-unknown": "evil",
}


@asynccontextmanager
async def one_that_trusts_its_clients(
    session: aiohttp.ClientSession, fleet: Fleet, directory: Path
) -> AsyncIterator[Client]:
    """A stack of its own whose Envoy takes this machine for internal, so leaves its clients' headers."""
    stack = Stack(directory)
    config = render_config(stack.ports)
    (listener,) = [each for each in config["static_resources"]["listeners"] if each["name"] == "ingress"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["internal_address_config"] = {
        "cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}],
    }
    command = stack.envoy()
    (directory / "envoy.yaml").write_text(yaml.safe_dump(config))
    with spawned(command) as envoy, spawned(stack.serve(fleet.config())):
        client = Client(session, stack, fleet)
        await ready(client, envoy)
        yield client


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_clients_set_no_retries_and_timeouts(client: Client, path: str) -> None:
    await _check_steering(client, path, external=True)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_internal_clients_set_none_either(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path, path: str
) -> None:
    async with one_that_trusts_its_clients(session, fleet, tmp_path) as client:
        await _check_steering(client, path, external=False)


async def _check_steering(client: Client, path: str, *, external: bool) -> None:
    """A slow answer comes all the same, and a bad one as often as without the headers."""
    for instance in client.fleet.decode:
        await client.fault(instance.id, delay=0.1, paths=[path])
    answer = await client.post(path, {"prompt": "p", "max_tokens": 2}, STEERING)
    assert answer.status == 200
    headers = {key.lower(): value for key, value in (await client.request_of(answer))["headers"].items()}
    ours = {"x-envoy-attempt-count", "x-envoy-expected-rq-timeout-ms", "x-envoy-internal"}
    if external:
        ours.add("x-envoy-external-address")
        assert headers["x-envoy-external-address"] == "127.0.0.1"
    assert {name for name in headers if name.startswith("x-envoy-")} <= ours
    assert headers["x-envoy-attempt-count"] == "1"
    assert "evil" not in str(headers)
    for instance in client.fleet.decode:
        await client.fault(instance.id, status=400, paths=[path])
    before = await client.seen_by_all()
    refused = await client.post(path, {"prompt": "p", "max_tokens": 2}, STEERING)
    assert refused.status == 400
    seen = [one for each in client.fleet.decode for one in await client.seen_since(each.id, before[each.id])]
    # Without those by which the scheduler frees the hand-off: D refuses them too.
    assert [one for one in map(_id, seen) if one] == [refused.headers["x-request-id"]]
    for instance in client.fleet.decode:
        await client.fault(instance.id)


# -- request smuggling

BODY = b'{"prompt":"p","max_tokens":2}'
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
KEPT = b"Connection: keep-alive"
EVIL = b"POST /evil HTTP/1.1\r\nHost: a\r\nX-Request-Id: evil\r\nContent-Length: 0\r\n\r\n"


def post(*headers: bytes, body: bytes) -> bytes:
    head = (b"POST /v1/completions HTTP/1.1", b"Host: a", b"Content-Type: application/json", *headers)
    return b"\r\n".join((*head, b"X-Request-Id: first", b"", b"")) + body


def old(*headers: bytes, body: bytes) -> bytes:
    return post(*headers, body=body).replace(b"HTTP/1.1", b"HTTP/1.0")


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
    return Answer(int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])))


async def exchange(client: Client, data: bytes) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Send bytes, then a plain request on the same connection.

    Return the answers until the connection was closed, and what the instances were sent.
    """
    before = await client.seen_by_all()
    reader, writer = await asyncio.open_connection("127.0.0.1", client.stack.ports.ingress)
    answers: list[Answer] = []
    try:
        async with asyncio.timeout(HUNG_S):
            writer.write(data + b"GET /version HTTP/1.1\r\nHost: a\r\nX-Request-Id: last\r\n\r\n")
            while not answers or (
                answers[-1].headers.get("connection") != "close"
                and answers[-1].headers.get("x-request-id") != "last"
            ):
                answers.append(await read_answer(reader))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
    finally:
        writer.close()
    seen = [each for name, number in before.items() for each in await client.seen_since(name, number)]
    return answers, seen


REFUSED = {
    "both lengths": post(LENGTH, CHUNKED, body=CHUNKS + EVIL),
    "both lengths, reversed": post(CHUNKED, b"Content-Length: 4", body=CHUNKS + EVIL),
    "length 0 and chunked": post(b"Content-Length: 0", CHUNKED, body=CHUNKS),
    "two lengths": post(LENGTH, b"Content-Length: 3", body=BODY),
    "two equal lengths": post(LENGTH, LENGTH, body=BODY),
    "list of lengths": post(b"Content-Length: 29, 29", body=BODY),
    "signed length": post(b"Content-Length: +29", body=BODY),
    "hexadecimal length": post(b"Content-Length: 0x1d", body=BODY),
    "bare LF in chunks": post(CHUNKED, body=CHUNKS.replace(b"\r\n", b"\n")),
    "chunk size too large": post(CHUNKED, body=b"fffffffffffffffff\r\n" + EVIL),
    "negative chunk size": post(CHUNKED, body=b"-1\r\n" + EVIL),
    "space before colon": post(b"Content-Length : 29", body=BODY),
    "encoding, space before colon": post(LENGTH, b"Transfer-Encoding : chunked", body=BODY),
    "xchunked": post(b"Transfer-Encoding: xchunked", body=CHUNKS),
    "chunked twice": post(CHUNKED, CHUNKED, body=CHUNKS),
    "chunked, identity": post(b"Transfer-Encoding: chunked, identity", body=CHUNKS),
    "identity": post(LENGTH, b"Transfer-Encoding: identity", body=BODY),
    "vertical tab": post(b"Transfer-Encoding: \x0bchunked", body=CHUNKS),
    "NUL": post(LENGTH, b"X-A: a\0b", body=BODY),
    "no colon": post(LENGTH, b"X-A", body=BODY),
    "no host": post(LENGTH, body=BODY).replace(b"Host: a\r\n", b""),
    "HTTP/1.0, both lengths": old(LENGTH, CHUNKED, body=CHUNKS + EVIL),
    "HTTP/1.0, two lengths": old(KEPT, LENGTH, b"Content-Length: 3", body=BODY),
    "HTTP/1.0, identity": old(KEPT, b"Transfer-Encoding: identity", body=BODY),
    "HTTP/1.0, bare LF in chunks": old(KEPT, CHUNKED, body=CHUNKS.replace(b"\r\n", b"\n")),
    "tunnel": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: a\r\n\r\n",
    "other protocol": post(b"Connection: upgrade", b"Upgrade: websocket", LENGTH, body=BODY),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
async def test_refused_with_all_that_follows(client: Client, data: bytes) -> None:
    answers, seen = await exchange(client, data)
    (answer,) = answers
    assert answer.status in (400, 403, 426, 501)
    assert answer.error["message"].strip()
    assert answer.headers["connection"] == "close"
    assert not seen


ONE_REQUEST = {
    "plain": post(LENGTH, body=BODY),
    "chunked": post(CHUNKED, body=CHUNKS),
    "folded header": post(LENGTH, b"X-A: b\r\n Transfer-Encoding: chunked", body=BODY),
    "bare LF in headers": post(LENGTH, body=BODY).replace(b"\r\n", b"\n"),
    "bare CR in a header": post(LENGTH, b"X-A: a\rContent-Length: 3", body=BODY),
    "chunk extension": post(CHUNKED, body=CHUNKS.replace(b"1d\r\n", b"1d;a=b\r\n", 1)),
    "underscore": post(b"Content_Length: 3", b"Transfer_Encoding: chunked", LENGTH, body=BODY),
    "upper case": post(b"TRANSFER-ENCODING: Chunked", body=CHUNKS),
    "hop by hop": post(b"Connection: keep-alive, x-pd-id, content-length", LENGTH, body=BODY),
    "HTTP/1.0": old(LENGTH, body=BODY),
    "HTTP/1.0, kept": old(KEPT, LENGTH, body=BODY),
    "HTTP/1.0, chunked": old(CHUNKED, body=CHUNKS),
    "HTTP/1.0, hop by hop": old(b"Connection: keep-alive, content-length", LENGTH, body=BODY),
    "trailers that steer": post(CHUNKED, body=CHUNKS[:-2] + b"x-pd-id: evil\r\nx-envoy-a: evil\r\n\r\n"),
}


@pytest.mark.parametrize("data", ONE_REQUEST.values(), ids=ONE_REQUEST)
async def test_exactly_one_request(client: Client, data: bytes) -> None:
    answers, seen = await exchange(client, data)
    assert [answer.status for answer in answers][:1] == [200]
    assert [answer.headers["x-request-id"] for answer in answers] in (["first", "last"], ["first"])
    got = [each["path"] for each in _of_first(seen)]
    assert got == ["/v1/completions"] * 2, "one for prefill and one for decode"
    assert [_id(each) for each in seen if each not in _of_first(seen)] in (["last"], [])
    assert "evil" not in json.dumps(seen)
    for each in seen:
        assert "transfer-encoding" not in {name.lower() for name in each["headers"]}


async def test_http_1_0_without_a_length_has_no_body(client: Client) -> None:
    answers, seen = await exchange(client, old(KEPT, body=BODY))
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [
        (400, "keep-alive"),
        (400, "close"),
    ]
    assert not seen


async def test_what_a_chunk_has_beyond_its_length_is_no_request(client: Client) -> None:
    """Envoy skips it to the end of its line."""
    answers, seen = await exchange(client, post(CHUNKED, body=b"2\r\n{}" + EVIL[:4] + b" /evil\r\n0\r\n\r\n"))
    assert [answer.status for answer in answers] == [400, 200]
    assert [each["path"] for each in seen if each["method"] != "POST"] == ["/version"]
    assert "evil" not in json.dumps(seen)


async def test_what_names_no_version_is_one_request_at_most(client: Client) -> None:
    answers, seen = await exchange(client, b"GET /v1/models\r\n\r\n")
    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [(200, "close")]
    assert [each["path"] for each in seen] == ["/v1/models"]


async def test_a_request_in_a_body_stays_there(client: Client) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-Request-Id: first\r\nContent-Length: %d\r\n\r\n" % len(
        EVIL
    )
    answers, seen = await exchange(client, head + EVIL)
    assert [answer.status for answer in answers] == [200, 200]
    assert sorted((_id(each), each["path"]) for each in seen) == [
        ("first", "/v1/models"),
        ("last", "/version"),
    ]


def _of_first(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what instances were sent with the id of the first request, or with the one of its hand-off.

    The latter goes to a P of which it is not known yet whether it pushes.
    """
    return [each for each in seen if (_id(each) or "").endswith(("first", "-push"))]


def _id(seen: dict[str, Any]) -> str | None:
    return next((value for key, value in seen["headers"].items() if key.lower() == "x-request-id"), None)
