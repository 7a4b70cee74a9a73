"""SGLang through real processes: P and D have a request at the same time, and D serves nothing alone."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile
from vllm_pd_scheduler.sim.text import Answer as Text
from vllm_pd_scheduler.sim.text import read_prompt, render_chat

PROMPT = "A room is entered by two, and left by both. " * 8
PATH = "/v1/completions"
NUMBERS = itertools.count()
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 12}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}),
}


def new_prompt() -> str:
    """A prompt that no request had before: none is refused because of how others with it have ended."""
    return f"{next(NUMBERS)} {PROMPT}"


def expected(body: dict[str, Any], tokens: int = 12) -> str:
    """The text that any engine writes that has the prompt's blocks."""
    prompt = body.get("prompt") or render_chat(body["messages"])
    answer = Text(read_prompt("sim-model", prompt), 0)
    return "".join(answer.word(number) for number in range(tokens))


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Engines that wait for each other longer than any test does."""
    profile = replace(EngineProfile.instant(), lease=300.0)
    with Fleet(2, 2, profile=profile, arguments=["--max-model-len=4096"], connector="sglang") as running:
        yield running


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack) -> Iterator[Process]:
    config = {
        "strategy": "round_robin",
        "public_paths": ["/generate", "/v1/responses"],
        "prefill_timeout": 4.0,
    }
    with spawned(stack.up({**config, **NO_EJECTION, **fleet.config()})) as process:
        yield process


@pytest_asyncio.fixture
async def client(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, up: Process
) -> AsyncIterator[Client]:
    """A client of a stack that is ready; afterwards nothing may be in flight or kept.

    Not the shared one: here a filter's script may refuse a further attempt, which the access log says.
    """
    client = Client(session, stack, fleet)
    await ready(client, up)
    await client.until_known()
    await client.until_split()
    yield client
    assert "script log" not in up.output, "a filter's script failed"
    await client.undo_faults()
    await client.until_in_flight(0)
    await client.until_freed()


async def has_it(client: Client, role: str, before: dict[str, int]) -> str:
    """Wait until an instance of a role has a request for a text; return its id."""
    found: list[str] = []

    async def reached() -> bool:
        for each in client.fleet.instances:
            seen = await client.seen_since(each.id, before[each.id]) if each.role == role else []
            found.extend(each.id for one in seen if one["path"].startswith("/v1/"))
        return bool(found)

    await until(reached)
    return found[0]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", BODIES)
async def test_the_text_is_that_of_an_engine_alone(client: Client, name: str, stream: bool) -> None:
    path, body = BODIES[name]
    for _ in range(4):  # each P and each D
        answer = await client.post(path, {**body, "stream": stream})
        assert (answer.status, answer.text) == (200, expected(body))
        assert "x-pd-prefill" in answer.headers
        seen = await client.request_of(answer)
        assert (seen["hand_off"], seen["outcomes"]) == ("receive", ["good"])


async def test_both_legs_have_the_same_room(client: Client) -> None:
    before = await client.seen_by_all()
    path, body = BODIES["completion"]
    await client.post(path, {**body, "stream": True, "bootstrap_host": "10.9.9.9", "routed_dp_rank": 7})
    legs = [
        json.loads(one["body"])
        for each in client.fleet.instances
        for one in await client.seen_since(each.id, before[each.id])
        if one["path"] == path
    ]
    assert len(legs) == 2
    assert sorted(leg.pop("stream") for leg in legs) == [False, True]
    assert legs[0] == legs[1]
    assert legs[0]["bootstrap_host"] == "127.0.0.1"
    assert legs[0]["routed_dp_rank"] is None
    assert 0 < legs[0]["bootstrap_room"] < 1 << 63
    assert {"prompt", "max_tokens"} < set(legs[0])


async def test_its_own_api(client: Client) -> None:
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 12}}
    answer = await client.post("/generate", body)
    assert (answer.status, answer.json["text"]) == (200, expected({"prompt": PROMPT}))
    assert "x-pd-prefill" in answer.headers
    streamed = await client.post("/generate", {**body, "stream": True})
    assert streamed.events[-1] == "[DONE]"


async def test_a_first_token_that_ends_the_text(client: Client) -> None:
    for instance in client.fleet.instances:
        await client.fault(instance.id, eos=True)
    answer = await client.complete(max_tokens=8)
    (choice,) = answer.json["choices"]
    assert (choice["finish_reason"], answer.json["usage"]["completion_tokens"]) == ("stop", 1)
    assert (await client.request_of(answer))["outcomes"] == ["good"]


async def test_several_prompts_each_have_a_room(client: Client) -> None:
    answer = await client.complete(prompt=[PROMPT + "one", PROMPT + "two"])
    assert answer.status == 200
    assert [choice["text"] for choice in answer.json["choices"]] == [
        expected({"prompt": PROMPT + each}, 8) for each in ("one", "two")
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT, "n": 2}),
        ("/v1/completions", {"prompt": PROMPT, "echo": True, "logprobs": 1}),
        ("/generate", {"text": PROMPT, "sampling_params": {"n": 2}}),
        ("/generate", {"text": PROMPT, "return_logprob": True, "logprob_start_len": 0}),
        ("/v1/responses", {"input": PROMPT}),
    ],
)
async def test_what_cannot_be_split_is_refused(client: Client, path: str, body: dict[str, Any]) -> None:
    answer = await client.post(path, body)
    assert (answer.status, answer.headers["x-pd-reason"]) == (501, "indivisible")


async def test_what_the_engines_refuse_is_what_the_client_gets(client: Client) -> None:
    answer = await client.complete(prompt="too long " * 4000)
    assert answer.status == 400
    assert "maximum context length" in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429}, {"reset": True}], ids=str)
async def test_a_d_that_fails(client: Client, fault: dict[str, Any], stream: bool) -> None:
    """Another one gets it, with a prefill of its own."""
    await client.fault("decode-0", **fault)
    for _ in range(4):
        body = {"prompt": new_prompt(), "max_tokens": 12}
        answer = await client.post(PATH, {**body, "stream": stream})
        assert (answer.status, answer.text) == (200, expected(body))
        assert answer.headers["x-pd-decode"] == "decode-1"
        assert answer.headers["x-pd-prefill"].startswith("prefill-")
        assert (await client.request_of(answer))["outcomes"] == ["good"]
    await client.until_freed()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}, {"status": 429}], ids=str)
async def test_a_p_that_fails(client: Client, fault: dict[str, Any], stream: bool) -> None:
    """D is not left waiting, and gets what another P prefills."""
    await client.fault("prefill-0", **fault)
    for _ in range(4):
        body = {"prompt": new_prompt(), "max_tokens": 12}
        answer = await client.post(PATH, {**body, "stream": stream})
        assert (answer.status, answer.text) == (200, expected(body))
        assert answer.headers["x-pd-prefill"] == "prefill-1"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_no_p_that_works(client: Client, stream: bool) -> None:
    for instance in client.fleet.prefill:
        await client.fault(instance.id, status=500)
    answer = await client.post(PATH, {"prompt": new_prompt(), "stream": stream})
    assert answer.status in (500, 503)
    assert "error" in answer.json


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_p_that_hangs(client: Client, stream: bool) -> None:
    """The request, which its D waits for, is given up after ``prefill_timeout``."""
    with client.frozen("prefill-0"):
        for _ in range(2):
            body = {"prompt": new_prompt(), "max_tokens": 12}
            answer = await client.post(PATH, {**body, "stream": stream})
            assert (answer.status, answer.text) == (200, expected(body))
            assert answer.headers["x-pd-prefill"] == "prefill-1"


async def test_a_p_that_is_killed_with_a_request(client: Client) -> None:
    for instance in client.fleet.prefill:
        await client.fault(instance.id, delay=30)
    before = await client.seen_by_all()
    body = {"prompt": new_prompt(), "max_tokens": 12}
    request = asyncio.ensure_future(client.post(PATH, body))
    victim = await has_it(client, "prefill", before)
    await has_it(client, "decode", before)
    for instance in client.fleet.prefill:
        await client.fault(instance.id)
    client.fleet.kill(victim)
    answer = await request
    await asyncio.to_thread(client.fleet.restart, victim)
    assert (answer.status, answer.text) == (200, expected(body))
    assert answer.headers["x-pd-prefill"] != victim


async def test_a_p_that_is_gone(client: Client) -> None:
    """D is told of a request only when P has it: streams too go to another P."""
    body = {"prompt": new_prompt(), "max_tokens": 12}
    client.fleet.kill("prefill-0")
    answers = [await client.post(PATH, {**body, "stream": True}) for _ in range(4)]
    await asyncio.to_thread(client.fleet.restart, "prefill-0")
    assert {(answer.status, answer.text) for answer in answers} == {(200, expected(body))}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_d_that_is_killed_with_a_request(client: Client, stream: bool) -> None:
    for instance in client.fleet.decode:
        await client.fault(instance.id, delay=30)
    before = await client.seen_by_all()
    body = {"prompt": new_prompt(), "max_tokens": 12}
    request = asyncio.ensure_future(client.post(PATH, {**body, "stream": stream}))
    victim = await has_it(client, "decode", before)
    for instance in client.fleet.decode:
        await client.fault(instance.id)
    client.fleet.kill(victim)
    answer = await request
    await asyncio.to_thread(client.fleet.restart, victim)
    assert (answer.status, answer.text) == (200, expected(body))
    assert answer.headers["x-pd-decode"] != victim


async def test_a_client_that_leaves(client: Client) -> None:
    """P is ended too: it would wait for its D for minutes."""
    for instance in client.fleet.decode:
        await client.fault(instance.id, delay=30)
    before = await client.seen_by_all()
    request = asyncio.ensure_future(client.complete(prompt=PROMPT + "left"))
    await has_it(client, "decode", before)
    request.cancel()
    await client.until_in_flight(0)
    for instance in client.fleet.decode:
        await client.fault(instance.id)
    await client.until_freed()


async def test_a_wrong_bootstrap_port(session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path) -> None:
    """P and D would wait for each other, for minutes. Another P gets the request, if there is one."""
    listed = fleet.config()
    listed["prefill_instances"][0]["connector"]["bootstrap_port"] = unused_ports(1)[0]
    stack = Stack(tmp_path)
    with spawned(stack.up({"strategy": "round_robin", **NO_EJECTION, **listed})) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        answers = [await client.complete(prompt=new_prompt()) for _ in range(2)]
        assert [(each.status, each.headers["x-pd-prefill"]) for each in answers] == [(200, "prefill-1")] * 2
        await client.admin("DELETE", "/instances/prefill-1")
        refused = await client.complete(prompt=new_prompt())
        assert (refused.status, refused.headers["x-pd-reason"]) == (503, "no_prefill")
        await process.says("/health does not answer as its connector needs it (question_connect)")
