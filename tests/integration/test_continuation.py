"""Streams that go on at another D when theirs dies, on a real Envoy."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
CONTINUE = {"x-pd-continue": "true"}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile(decode_base=0.01), arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    del tmp_path_factory
    more = {"continuation_port": unused_ports(1)[0], "health_check_interval": 0.1}
    config = {"strategy": "round_robin", **NO_EJECTION, **fleet.config(), **more}
    with spawned(stack.up(config)) as process:
        yield process


class Stream:
    """A stream that was read to its end, or until it was cut."""

    def __init__(self, text: str, cut: bool, headers: dict[str, str]) -> None:
        self.cut, self.headers, self.raw = cut, headers, text
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
        self.done = events.count("[DONE]")
        self.events = [json.loads(event) for event in events if event != "[DONE]"]

    @property
    def text(self) -> str:
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices)

    @property
    def usage(self) -> Any:
        return next((event["usage"] for event in self.events if event.get("usage")), None)

    @property
    def finish(self) -> list[str]:
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return [each["finish_reason"] for each in choices if each["finish_reason"]]


def body_of(path: str, prompt: str, **more: Any) -> dict[str, Any]:
    asked = {"prompt": prompt} if path == COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
    return {**asked, "stream": True, "max_tokens": 40, "stream_options": {"include_usage": True}, **more}


async def stream(client: Client, path: str, body: dict[str, Any], headers: dict[str, str]) -> Stream:
    async with client.session.post(client.stack.url + path, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        read, cut = b"", False
        try:
            async for data in response.content.iter_any():
                read += data
        except aiohttp.ClientError:
            cut = True
        found = {name.lower(): value for name, value in response.headers.items()}
        return Stream(read.decode(), cut, found)


async def half(client: Client) -> None:
    """Have the next stream cut at the second token, whoever decodes it."""
    for each in client.fleet.decode:
        await client.fault(each.id, half=True, times=1)


async def unbroken(client: Client, path: str, body: dict[str, Any]) -> Stream:
    await client.undo_faults()
    found = await stream(client, path, body, {})
    assert found.done == 1
    return found


async def continued(client: Client, outcome: str) -> float:
    _, page = await client.admin("GET", "/metrics")
    name = f'pd_scheduler_streams_continued_total{{outcome="{outcome}"}} '
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_that_breaks_off_goes_on(client: Client, path: str) -> None:
    body = body_of(path, "What is a lighthouse?")
    whole = await unbroken(client, path, body)
    before = await continued(client, "continued")
    await client.fault("decode-0", half=True)
    broken = [await stream(client, path, body, CONTINUE) for _ in range(2)]
    assert await continued(client, "continued") > before, "none was cut"
    for found in broken:
        assert not found.cut
        assert found.done == 1
        assert found.text == whole.text
        assert {key: found.usage[key] for key in ("prompt_tokens", "total_tokens", "completion_tokens")} == {
            key: whole.usage[key] for key in ("prompt_tokens", "total_tokens", "completion_tokens")
        }
        assert found.finish == whole.finish
        for name in ("id", "object", "created", "model"):
            assert len({event[name] for event in found.events}) == 1, name
        assert "token_ids" not in found.raw
        roles = [c for e in found.events for c in e["choices"] if "role" in c.get("delta", {})]
        assert len(roles) == (path == CHAT)
        assert "x-pd-decode" in found.headers
        assert "x-pd-prefill" in found.headers


async def test_an_operator_sees_that_a_stream_went_on(client: Client, up: Process) -> None:
    body = body_of(CHAT, "What is a foghorn?")
    await client.undo_faults()
    await client.fault("decode-0", half=True)
    for number in range(2):
        found = await stream(client, CHAT, body, {**CONTINUE, "x-request-id": f"foghorn-{number}"})
        assert found.done == 1
    seen = [await decisions(client, f"foghorn-{number}") for number in range(2)]
    second, first = next(each for each in seen if len(each) > 1)
    assert first["decode"]["attempts"] == [{"instance": "decode-0", "outcome": "cut"}]
    assert first["continues"] is None
    assert second["continues"]["decode"] == "decode-0"
    assert second["continues"]["tokens"] > 0
    assert second["decode"]["picked"] == "decode-1"
    _, page = await client.admin("GET", "/metrics")
    labels = 'decode="decode-1",failed="decode-0"'
    assert f"pd_scheduler_continued_after_tokens_count{{{labels}}}" in page
    command = [sys.executable, "-m", "vllm_pd_scheduler", "explain", first["request_id"]]
    shown = await asyncio.to_thread(
        subprocess.run, [*command, "--url", client.stack.admin], capture_output=True, text=True
    )
    tokens = second["continues"]["tokens"]
    assert f"answer of decode-0, which failed it after {tokens} tokens" in shown.stdout, shown
    logged = f'"continued_from":"decode-0/{tokens}"'
    await until(lambda: _true(logged in up.output))


async def decisions(client: Client, request_id: str) -> list[dict[str, Any]]:
    """Return what is known of a request once its answers have ended, the newest first."""
    found: list[dict[str, Any]] = []

    async def ended() -> bool:
        _, page = await client.admin("GET", f"/decisions?request_id={request_id}")
        assert "decisions" in page, page
        found[:] = [each for each in page["decisions"] if each["path"] in (CHAT, COMPLETIONS)]
        return bool(found) and all(each["outcome"] is not None for each in found)

    await until(ended)
    return found


async def test_a_client_that_claims_to_go_on_is_an_ordinary_one(client: Client) -> None:
    await client.undo_faults()
    name = "claims-to-go-on"
    claim = {"x-pd-continues": "key 7 decode-0", "x-pd-continued-from": "decode-0/7", "x-request-id": name}
    for path in (COMPLETIONS, CHAT):
        assert (await stream(client, path, body_of(path, "What is a mole?"), {**claim, **CONTINUE})).done
        assert (await stream(client, path, body_of(path, "What is a mole?"), claim)).done
    assert all(each["continues"] is None for each in await decisions(client, name))


async def test_a_client_that_does_not_ask_gets_the_cut(client: Client) -> None:
    await half(client)
    found = await stream(client, CHAT, body_of(CHAT, "What is a harbour?"), {})
    assert found.cut
    assert not found.done


@pytest.mark.parametrize(
    "more", [{"stop": ["zzz"]}, {"presence_penalty": 1.0}, {"logprobs": True}, {"n": 2}, {"tools": [{}]}]
)
async def test_what_cannot_go_on_is_cut(client: Client, more: dict[str, Any]) -> None:
    before = await continued(client, "impossible")
    await half(client)
    found = await stream(client, CHAT, body_of(CHAT, "What is a buoy?", **more), CONTINUE)
    assert found.cut
    assert not found.done
    assert await continued(client, "impossible") == before + 1


async def test_a_stream_without_a_limit_goes_on(client: Client) -> None:
    body = body_of(CHAT, "What is an anchor?")
    del body["max_tokens"]
    whole = await unbroken(client, CHAT, body)
    await client.fault("decode-0", half=True)
    for _ in range(2):
        assert (await stream(client, CHAT, body, CONTINUE)).text == whole.text


async def test_a_second_break_is_a_cut(client: Client) -> None:
    for each in client.fleet.decode:
        await client.fault(each.id, half=True)
    found = await stream(client, CHAT, body_of(CHAT, "What is a pier?"), CONTINUE)
    assert found.cut
    assert not found.done


async def test_a_client_that_leaves_ends_the_request(client: Client) -> None:
    body = body_of(CHAT, "What is a tide?", max_tokens=4000, ignore_eos=True)
    async with client.session.post(client.stack.url + CHAT, json=body, headers=CONTINUE) as response:
        await response.content.readany()
        await client.until_in_flight(1)
    await client.until_in_flight(0)


async def test_errors_and_whole_answers_pass_unchanged(client: Client) -> None:
    whole = {"prompt": "Where?", "max_tokens": 4}
    assert (await client.post(COMPLETIONS, whole, CONTINUE)).text == (
        await client.post(COMPLETIONS, whole)
    ).text
    bad = await client.post(COMPLETIONS, {"prompt": "Where?", "max_tokens": -1, "stream": True}, CONTINUE)
    assert bad.status == 400
    assert (await client.post(COMPLETIONS, b"{", CONTINUE)).status == 400


async def test_dead_processes_under_load(client: Client) -> None:
    """Kill a D again and again while streams run: every text is right, or the stream is cut."""
    await kill_under_load(client, kills=3)


@pytest.fixture(scope="module")
def with_workers(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Process]]:
    stack = Stack(tmp_path_factory.mktemp("workers"))
    port = unused_ports(1)[0]
    while unused_ports(1) != [port + 1]:
        port = unused_ports(1)[0]
    more = {"continuation_port": port, "health_check_interval": 0.1}
    config = {"strategy": "round_robin", **NO_EJECTION, **fleet.config(), **more}
    with spawned([*stack.up(config), "--workers=2"]) as process:
        yield stack, process


async def test_each_worker_has_streams_go_on(fleet: Fleet, with_workers: tuple[Stack, Process]) -> None:
    """The rest is asked of any worker, which knows by whom it must not be written."""
    stack, process = with_workers
    async with aiohttp.ClientSession() as session:
        client = Client(session, stack, fleet)
        await ready(client, process)
        body = body_of(COMPLETIONS, "What is a mooring?")
        whole = await unbroken(client, COMPLETIONS, body)
        await client.fault("decode-0", half=True)
        asked = (stream(client, COMPLETIONS, body, {**CONTINUE, "x-request-id": f"m-{n}"}) for n in range(12))
        found = await asyncio.gather(*asked)
        assert [each.text for each in found] == [whole.text] * 12
        assert not [each for each in found if each.cut]
        seen = [await decisions(client, f"m-{number}") for number in range(12)]
        rests = [each[0] for each in seen if len(each) > 1]
        assert rests
        assert {each["continues"]["decode"] for each in rests} == {"decode-0"}
        assert {each["decode"]["picked"] for each in rests} == {"decode-1"}
        assert {each["id"].partition(".")[0] for each in rests} == {"w0", "w1"}
        await client.undo_faults()
        await kill_under_load(client, kills=2)
        assert "Traceback" not in process.output


async def kill_under_load(client: Client, kills: int) -> None:
    streams = 8
    bodies = [body_of(CHAT, f"Story {number}?", ignore_eos=True, max_tokens=60) for number in range(streams)]
    right = [(await stream(client, CHAT, body, {})).text for body in bodies]
    right_usage = 60
    ended: list[tuple[int, Stream]] = []
    stop = asyncio.Event()

    async def ask(number: int) -> None:
        while not stop.is_set():
            ended.append((number, await stream(client, CHAT, bodies[number], CONTINUE)))

    before = await continued(client, "continued")
    asking = [asyncio.ensure_future(ask(number)) for number in range(streams)]
    for kill in range(kills):
        name = f"decode-{kill % 2}"
        at = len(ended)
        await until(lambda at=at: _true(len(ended) >= at + streams))
        client.fleet.kill(name)
        await until(lambda at=at: _true(len(ended) >= at + 3 * streams))
        await asyncio.to_thread(client.fleet.restart, name)
        await until(lambda name=name: _is_healthy(client, name))
    stop.set()
    await asyncio.gather(*asking)
    wrong = [found.text for number, found in ended if found.done and found.text != right[number]]
    assert not wrong
    assert all(found.usage["completion_tokens"] == right_usage for _, found in ended if found.done)
    assert await continued(client, "continued") > before
    assert not [found for _, found in ended if found.cut]


async def _true(value: bool) -> bool:
    return value


async def _is_healthy(client: Client, name: str) -> bool:
    return (await client.states())[name] == "healthy"


async def test_without_the_scheduler_it_is_a_stream_like_all_others(
    client: Client, fleet: Fleet, tmp_path: Path
) -> None:
    """Envoy asks its own ingress while nobody listens at the port."""
    del client
    stack = Stack(tmp_path)
    port = unused_ports(1)[0]
    stack.ports = replace(stack.ports, continuation=port)
    config = {**fleet.config(), "continuation_port": port}
    with spawned(stack.serve(config)) as scheduler, spawned(stack.envoy()):
        async with aiohttp.ClientSession() as session:
            other = Client(session, stack, fleet)

            async def serves() -> bool:
                try:
                    return (await other.complete()).status == 200
                except aiohttp.ClientError:
                    return False

            await until(serves)
            scheduler.process.kill()
            scheduler.process.wait()
            found = await stream(other, CHAT, body_of(CHAT, "What is a reef?"), CONTINUE)
            assert found.done == 1
            assert not found.cut
