"""Each hand-off protocol through real processes: texts, P that stop, restart or leave, clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.test_apis import PATHS, REQUESTS, said, undivided
from tests.support.processes import NO_EJECTION, Client, Process, Stack, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

PINS = ["mooncake", "ascend-mooncake", "moriio-read", "moriio-write"]
"""Connectors whose P keeps its blocks for D, and none after a stop."""
CONNECTORS = [*PINS, "offloading-p2p", "ascend-layerwise"]
ONLY_BY_HEADER = ["ascend-layerwise"]
"""Protocols in which P and D know a request by its ``X-Request-Id``, which not all APIs take."""
D_IS_NOT_TOLD = {"ascend-mooncake", "offloading-p2p"}
"""Where nothing that D gets says how much of a prompt P had cached."""
PROMPT = "A hand-off is used once, in time, and only one that we made. " * 8
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 12}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}),
    "stopped": (
        "/v1/completions",
        {"prompt": PROMPT, "max_tokens": 40, "min_tokens": 3, "stop": ["never"], "stop_token_ids": [1]},
    ),
}


@pytest.fixture(scope="module", params=CONNECTORS)
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    profile = replace(EngineProfile.instant(), lease=480.0)
    arguments = ["--max-model-len=4096", "--load-fail-delay=0.5"]
    with Fleet(2, 2, profile=profile, arguments=arguments, connector=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack) -> Iterator[Process]:
    limits: dict[str, Any] = {"strategy": "round_robin", "decode_first_byte_timeout": 5.0}
    (limits["metaserver_port"],) = unused_ports(1)
    with spawned(stack.up({**limits, **NO_EJECTION, **fleet.config()})) as process:
        yield process


@pytest_asyncio.fixture
async def client(client: Client) -> AsyncIterator[Client]:
    """A client whose requests are split; afterwards nothing may be in flight or pinned."""
    await client.until_split()
    yield client
    await client.undo_faults()
    await client.until_in_flight(0)
    await client.until_freed()


async def alone(client: Client, path: str, body: dict[str, Any]) -> str:
    """Return the text that a D gives which computes the prompt itself."""
    async with client.session.post(client.fleet["decode-1"].url + path, json=body) as response:
        (choice,) = (await response.json())["choices"]
        return str(choice.get("text") or choice["message"]["content"])


async def restarted(client: Client, name: str) -> None:
    """Restart an instance, as slowly as an engine starts: probes have found it gone."""

    async def gone() -> bool:
        return (await client.states())[name] == "unhealthy"

    client.fleet.kill(name)
    await until(gone)
    await asyncio.to_thread(client.fleet.restart, name)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", BODIES)
async def test_the_text_is_that_of_an_engine_alone(client: Client, name: str, stream: bool) -> None:
    path, body = BODIES[name]
    expected = await alone(client, path, body)
    for _ in range(4):  # each P and each D
        answer = await client.post(path, {**body, "stream": stream})
        assert (answer.status, answer.text) == (200, expected)
        assert "x-pd-prefill" in answer.headers
        seen = await client.request_of(answer)
        assert (seen["hand_off"], seen["outcomes"]) == ("receive", ["good"])
        (own,) = [json.loads(seen["body"])]
        own.pop("kv_transfer_params")
        assert own == {**body, "stream": stream}, "D gets the client's own fields"


async def test_a_first_token_that_ends_the_text(client: Client) -> None:
    """P is kept from stopping there, where it would keep no blocks; D stops by itself."""
    for instance in client.fleet.instances:
        await client.fault(instance.id, eos=True)
    answer = await client.complete(max_tokens=8)
    (choice,) = answer.json["choices"]
    assert (choice["finish_reason"], answer.json["usage"]["completion_tokens"]) == ("stop", 1)
    assert (await client.request_of(answer))["outcomes"] == ["good"]


@pytest.mark.parametrize("path", PATHS)
async def test_other_apis(client: Client, path: str) -> None:
    expected = said(await undivided(client, path))
    for stream in (False, True):
        answer = await client.post(path, {**REQUESTS[path], "stream": stream})
        assert said(answer) == expected
        assert ("x-pd-prefill" in answer.headers) is (client.fleet.connector not in ONLY_BY_HEADER)
        if client.fleet.connector in ONLY_BY_HEADER:
            continue
        assert (await client.request_of(answer))["outcomes"] == ["good"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_first_token_that_ends_the_text_in_an_api_that_cannot_forbid_it(
    client: Client, path: str
) -> None:
    """P has kept nothing: D computes the prompt, rather than wait for it."""
    for instance in client.fleet.instances:
        await client.fault(instance.id, eos=True)
    answer = await client.post(path, REQUESTS[path])
    assert answer.status == 200
    assert ("x-pd-prefill" in answer.headers) is (client.fleet.connector not in (*PINS, *ONLY_BY_HEADER))
    assert answer.json["usage"]["output_tokens"] == 1


async def test_a_self_check(client: Client) -> None:
    if client.fleet.connector == "ascend-layerwise":
        pytest.skip("D begins: a self-check cannot say which P it gets")
    for prefill in client.fleet.prefill:
        for decode in client.fleet.decode:
            one = await client.self_check(prefill.id, decode.id)
            assert one["result"] == "match", one
            (split, whole) = (await client.seen(decode.id))[-2:]
            assert (split["outcomes"], whole["hand_off"]) == (["good"], None)


async def test_a_client_that_leaves(client: Client) -> None:
    """P's blocks are free at once, not when the lease is over."""
    for instance in client.fleet.decode:
        await client.fault(instance.id, delay=30)
    before = await client.seen_by_all()
    request = asyncio.ensure_future(client.complete(prompt=PROMPT + "left"))

    async def forwarded() -> bool:
        return any([await client.seen_since(each.id, before[each.id]) for each in client.fleet.decode])

    await until(forwarded)
    request.cancel()
    for instance in client.fleet.decode:
        await client.fault(instance.id)
    await client.until_freed()


@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}])
async def test_a_d_that_fails(client: Client, fault: dict[str, Any]) -> None:
    """Another one computes the prompt, and P's blocks are free at once."""
    path, body = BODIES["completion"]
    expected = await alone(client, path, body)
    await client.fault("decode-0", **fault)
    answers = [await client.post(path, body) for _ in range(4)]
    assert {(answer.status, answer.text) for answer in answers} == {(200, expected)}
    assert "x-pd-prefill" not in answers[0].headers or "x-pd-prefill" not in answers[1].headers
    await client.until_freed()


async def test_a_p_that_was_restarted(client: Client) -> None:
    """What is known of the process before is not used."""
    path, body = BODIES["completion"]
    expected = await alone(client, path, body)
    await restarted(client, "prefill-0")

    async def hands_over() -> bool:
        answer = await client.post(path, body)
        assert (answer.status, answer.text) == (200, expected)
        if await client.prefilled_by(answer) != "prefill-0":
            return False
        return (await client.request_of(answer))["outcomes"] == ["good"]

    await until(hands_over)


async def cached(client: Client, prompt: str) -> tuple[list[int], list[str | None]]:
    """Return what usage and the header say of a prompt that each P gets twice."""
    answers = [await client.complete(prompt=prompt * 8) for _ in range(4)]
    assert all("x-pd-prefill" in answer.headers for answer in answers)
    said = [answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    return said, [answer.headers.get("x-pd-cached-tokens") for answer in answers]


async def test_usage_says_what_p_had_cached(client: Client) -> None:
    """Not what D has got from it. Where D cannot know, a header says it."""
    if client.fleet.connector == "ascend-layerwise":
        pytest.skip("P answers when D has begun")
    said, headers = await cached(client, "Who has seen this prompt before? ")
    if client.fleet.connector in D_IS_NOT_TOLD:
        said = [int(each or -1) for each in headers]
    else:
        assert headers == [None] * 4
    assert said[:2] == [0, 0]
    assert min(said[2:]) > 0


@pytest.mark.parametrize("fleet", ["shared-store"], indirect=True, scope="module")
async def test_a_header_says_what_p_had_cached_where_d_cannot_know(client: Client) -> None:
    _, headers = await cached(client, "Who has put this prompt into the store? ")
    assert headers[:2] == ["0", "0"]
    assert min(int(each or 0) for each in headers[2:]) > 0
    fake = {"x-pd-cached-tokens": "7"}
    passed = await client.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1}, fake)
    assert passed.status == 200
    assert "x-pd-cached-tokens" not in passed.headers, "a client's own goes no further"
    for number in range(2):
        await client.fault(f"decode-{number}", status=500)
        other = [await client.complete(prompt=f"{number} fails " * 20) for _ in range(2)]
        await client.fault(f"decode-{number}")
        for answer in other:
            assert answer.status == 200
            assert ("x-pd-cached-tokens" in answer.headers) is ("x-pd-prefill" in answer.headers)


QUERY = ["/query"]


@pytest.mark.parametrize("fleet", ["mooncake"], indirect=True, scope="module")
class TestBootstrapServer:
    async def test_it_is_asked_once(self, client: Client) -> None:
        before = await client.seen_by_all()
        for _ in range(4):
            assert "x-pd-prefill" in (await client.complete()).headers
        for instance in client.fleet.prefill:
            seen = await client.seen_since(instance.id, before[instance.id])
            assert "/query" not in [each["path"] for each in seen]

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [({"status": 500}, "status"), ({"reset": True}, "reset"), ({"delay": 30}, "timeout")],
    )
    async def test_one_that_fails(self, client: Client, fault: dict[str, Any], reason: str) -> None:
        """Another P gets the request; where there is none, D computes the prompt."""
        await restarted(client, "prefill-0")
        await client.fault("prefill-0", paths=QUERY, **fault)

        async def counted() -> bool:
            answer = await client.complete()
            assert answer.status == 200
            assert answer.headers.get("x-pd-prefill") in (None, "prefill-1")
            _, page = await client.admin("GET", "/metrics")
            return (
                f'pd_scheduler_prefill_failures_total{{prefill="prefill-0",reason="question_{reason}"}}'
                in page
            )

        async def other() -> bool:
            return (await client.complete()).headers.get("x-pd-prefill") == "prefill-1"

        await until(counted)
        await until(other)
