"""What a client gets when its request, or an instance, is bad: an OpenAI-shaped error or another instance."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.bodies import REFUSED
from tests.support.processes import Answer, Client
from tests.support.waiting import until

BODY = {"prompt": "Where is the cache?", "max_tokens": 8}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"null", b'{"prompt": "x",}', b"\xff\xfe{\x00}\x00", b'{"prompt": nan}'],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_broken_bodies(client: Client, path: str, body: bytes) -> None:
    answer = await client.post(path, body)
    assert (answer.status, answer.error["type"]) == (400, "BadRequestError")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("head", "tail"),
    [
        (b"\xef\xbb\xbf{", b"}"),
        (b"{", b', "x": [NaN, -Infinity]}'),
        (b"{", b', "x": {"\\ud800": "\\udc00"}}'),
        (b'{"\xed\xa0\x80": 1, ', b"}"),
    ],
    ids=["BOM", "NaN", "surrogates", "raw surrogate"],
)
async def test_what_json_does_not_know_and_vllm_reads(
    client: Client, path: str, head: bytes, tail: bytes
) -> None:
    """Split, with the same answer as without it."""
    fields = json.dumps({**BODY, "messages": [{"role": "user", "content": "Where?"}]}).encode()
    plain = await client.post(path, fields)
    odd = await client.post(path, head + fields[1:-1] + tail)
    assert (odd.status, odd.text) == (200, plain.text)
    assert odd.headers["x-pd-prefill"]


@pytest.mark.parametrize("name", ["max_tokens", "prompt", "messages", "n"])
async def test_nan_is_vllms_to_refuse(client: Client, name: str) -> None:
    fields = {**BODY, "messages": [{"role": "user", "content": "Where?"}], name: float("nan")}
    answer = await client.post("/v1/chat/completions" if name == "messages" else "/v1/completions", fields)
    assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.parametrize("prompt", ["Where is the cache?", [1, 2, 3], "long " * 10_000, list(range(9_000))])
async def test_one_prompt_in_a_list_is_split(client: Client, prompt: Any) -> None:
    plain, listed = [await client.complete(prompt=each) for each in (prompt, [prompt])]
    if len(prompt) < 9_000:
        assert plain.text == listed.text
        assert listed.headers["x-pd-prefill"]
    assert plain.status == listed.status
    several = await client.complete(prompt=[prompt, prompt])
    assert "x-pd-prefill" not in several.headers


@pytest.mark.parametrize("shape", REFUSED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_bodies_that_are_cheap_to_send(client: Client, path: str, shape: str) -> None:
    answer = await client.post(path, REFUSED[shape](1 << 20))
    assert (answer.status, answer.error["type"]) == (400, "BadRequestError")


async def test_no_body_at_all(client: Client) -> None:
    answer = await client.send("POST", "/v1/completions")
    assert answer.status == 400
    assert "no body" in answer.error["message"]


async def test_a_body_over_the_limit(client: Client) -> None:
    answer = await client.post("/v1/completions", b'{"prompt":"' + b"x" * (65 << 20) + b'"}')
    assert (answer.status, answer.error["type"]) == (413, "RequestEntityTooLargeError")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({**BODY, "model": "no-such-model"}, 404),
        ({"prompt": "word " * 20_000, "max_tokens": 8}, 400),
        ({"max_tokens": 8}, 400),
        ({"prompt": 17}, 400),
    ],
    ids=["unknown model", "prompt too long", "no prompt", "wrong type"],
)
async def test_vllms_own_errors_pass_unchanged(client: Client, body: dict[str, Any], status: int) -> None:
    async with client.session.post(client.fleet.decode[0].url + "/v1/completions", json=body) as response:
        expected = await response.json()
    answer = await client.post("/v1/completions", body)
    assert (answer.status, answer.json) == (status, expected)
    assert answer.headers["content-type"].startswith("application/json")


# -- prefill instances that fail


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"status": 503}, {"status": 429}, {"reset": True}, {"half": True}]
)
async def test_a_bad_prefill_instance_is_passed_over(client: Client, fault: dict[str, Any]) -> None:
    await client.fault("prefill-0", **fault)
    answers = [await client.complete() for _ in range(4)]
    assert {a.status for a in answers} == {200}
    assert {a.headers["x-pd-prefill"] for a in answers} == {"prefill-1"}
    assert len({a.text for a in answers}) == 1


async def test_without_a_good_prefill_instance_decode_prefills(client: Client) -> None:
    expected = (await client.complete()).text
    for instance in client.fleet.prefill:
        await client.fault(instance.id, status=500)
    answer = await client.complete()
    assert answer.text == expected
    assert "x-pd-prefill" not in answer.headers


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_what_prefill_refuses_is_decodes_to_answer(client: Client, status: int) -> None:
    for instance in client.fleet.prefill:
        await client.fault(instance.id, status=status)
    answer = await client.complete()
    assert answer.status == 200, "P was asked another request"
    assert "x-pd-prefill" not in answer.headers
    for instance in client.fleet.instances:
        await client.fault(instance.id, status=status)
    assert (await client.complete()).error["code"] == status


async def test_a_decode_instance_that_refuses_is_passed_over(client: Client) -> None:
    dead = client.fleet["decode-0"]
    client.fleet.kill(dead.id)
    try:
        answers: list[Answer] = [await client.complete() for _ in range(6)]
    finally:
        client.fleet.restart(dead.id)
    assert {(a.status, a.headers["x-pd-decode"]) for a in answers} == {(200, "decode-1")}
    await _all_healthy(client)


# -- fleets that cannot serve


@pytest_asyncio.fixture
async def killed(client: Client, request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Kill all instances of a role and wait until that is known; restart them afterwards."""
    role: str = request.param
    instances = [each for each in client.fleet.instances if each.role == role]
    for instance in instances:
        client.fleet.kill(instance.id, signal.SIGKILL)

    async def known() -> bool:
        states = await client.states()
        return {states[each.id] for each in instances} == {"unhealthy"}

    await until(known)
    yield
    for instance in instances:
        client.fleet.restart(instance.id)
    await _all_healthy(client)


@pytest.mark.parametrize("killed", ["prefill"], indirect=True)
@pytest.mark.usefixtures("killed")
async def test_no_healthy_prefill_instance(client: Client) -> None:
    answer = await client.complete()
    assert answer.status == 200
    assert "x-pd-prefill" not in answer.headers
    await _not_healthy(client)


@pytest.mark.parametrize("killed", ["decode"], indirect=True)
@pytest.mark.usefixtures("killed")
async def test_no_healthy_decode_instance(client: Client) -> None:
    before = await client.seen_by_all()
    for method, path, body in [
        ("POST", "/v1/completions", BODY),
        ("POST", "/v1/completions", {**BODY, "n": 2}),
        ("GET", "/v1/models", None),
    ]:
        answer = await client.send(method, path, body)
        assert (answer.status, answer.error["type"]) == (503, "ServiceUnavailableError")
        assert int(answer.headers["retry-after"]) >= 1
        assert "decode-0 is unhealthy" in answer.error["message"]
    await _not_healthy(client)
    assert await client.seen_by_all() == before, "no prefill was done in vain"
    status, reason = await client.admin("GET", "/readyz")
    assert (status, reason) == (503, {"error": "no decode instance can serve"})


async def _not_healthy(client: Client) -> None:
    """Wait until Envoy says so: it is told of changes that come together a moment later."""

    async def not_healthy() -> bool:
        return (await client.send("GET", "/health")).status == 503

    await until(not_healthy)


async def _all_healthy(client: Client) -> None:
    async def healthy() -> bool:
        hosts = await client.envoy_hosts()
        return set((await client.states()).values()) == {"healthy"} and "UNHEALTHY" not in hosts.values()

    await until(healthy)
