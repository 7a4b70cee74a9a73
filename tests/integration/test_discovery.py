"""Instances that come and go in files, and a configuration that is read again, under requests."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.overload import PATIENT
from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until

STREAM = {"prompt": "p", "max_tokens": 40, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 3, arguments=["--decode-base=0.005"]) as running:
        yield running


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


@pytest.fixture
def instances(tmp_path: Path, fleet: Fleet) -> Path:
    path = tmp_path / "instances.json"
    write(path, fleet.config())
    return path


@pytest.fixture
def settings(instances: Path) -> dict[str, Any]:
    return {**PATIENT, "instance_files": [str(instances)]}


def write(path: Path, content: Any) -> None:
    new = path.with_name("new")
    new.write_text(content if isinstance(content, str) else json.dumps(content))
    os.replace(new, path)


def without(fleet: Fleet, *names: str) -> dict[str, Any]:
    return {
        key: [each for each in entries if each["id"] not in names] for key, entries in fleet.config().items()
    }


async def events(client: Client, kind: str) -> list[str]:
    _, found = await client.admin("GET", "/events?limit=1000")
    return [event["text"] for event in found["events"] if event["kind"] == kind]


async def until_states(client: Client, **expected: str) -> None:
    """Wait until these instances have these states; ``gone``: there is no such instance."""

    async def so() -> bool:
        states = {name: str(state) for name, state in (await client.states()).items()}
        return all(states.get(name.replace("_", "-"), "gone") == state for name, state in expected.items())

    await until(so)


@asynccontextmanager
async def load(client: Client) -> AsyncIterator[list[str]]:
    """Send requests one after another in four loops, whole answers and streams; yield what went wrong."""
    failures: list[str] = []
    ending, served = asyncio.Event(), 0

    async def send(stream: bool) -> None:
        nonlocal served
        while not ending.is_set():
            answer = await client.post("/v1/completions", {**STREAM, "stream": stream})
            if answer.status != 200 or (stream and not answer.body.endswith(b"data: [DONE]\n\n")):
                failures.append(f"{answer.status}: {answer.body[-200:]!r}")
            served += 1

    loops = [asyncio.ensure_future(send(number % 2 == 0)) for number in range(4)]

    async def enough() -> bool:
        return served > 8

    try:
        yield failures
        await until(enough)
    finally:
        ending.set()
        await asyncio.gather(*loops)
    assert failures == []


@asynccontextmanager
async def running(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any]
) -> AsyncIterator[tuple[Client, Process]]:
    with spawned(stack.up(settings)) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        await client.until_split()
        yield client, process
        assert "Traceback" not in process.output


async def test_instances_that_come_and_go_in_a_file_cost_no_request(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any], instances: Path
) -> None:
    async with running(session, stack, fleet, settings) as (client, _), load(client):
        assert (await client.instance("decode-0"))["source"] == f"file:{instances}"
        for gone in ("decode-0", "prefill-1", "decode-2"):
            write(instances, without(fleet, gone))
            await until_states(client, **{gone.replace("-", "_"): "gone"})
            write(instances, fleet.config())
            await until_states(client, **{gone.replace("-", "_"): "healthy"})
        write(instances, json.dumps(fleet.config())[:-9])

        async def refused() -> bool:
            return any("instances.json: line 1" in text for text in await events(client, "discovery"))

        await until(refused)
        assert len(await client.states()) == 5


async def test_a_stream_on_an_instance_that_is_dropped_ends_first(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any], instances: Path
) -> None:
    async with running(session, stack, fleet, settings) as (client, _):
        async with client.held_stream() as stream:
            name = stream.headers["x-pd-decode"]
            write(instances, without(fleet, name))
            await until_states(client, **{name.replace("-", "_"): "draining"})
            assert (await client.instance(name))["source"] == ""
            status, found = await client.admin("POST", f"/instances/{name}/undrain")
            assert (status, "no source names" in found["error"]) == (409, True)
            write(instances, fleet.config())

            async def back() -> bool:
                return (await client.instance(name))["source"] != ""

            await until(back)
            write(instances, without(fleet, name))
            await until_states(client, **{name.replace("-", "_"): "draining"})
            assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
        await until_states(client, **{name.replace("-", "_"): "gone"})


async def hangup(client: Client, process: Process, path: Path, config: dict[str, Any]) -> None:
    in_place(path, config)
    process.signal(signal.SIGHUP)


async def asked(client: Client, process: Process, path: Path, config: dict[str, Any]) -> None:
    in_place(path, config)
    status, found = await client.admin("POST", "/reload")
    assert status == 200, found
    assert found["needs_restart"] == ["grpc_port"]


async def changed(client: Client, process: Process, path: Path, config: dict[str, Any]) -> None:
    write(path, config)


def in_place(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("tell", [hangup, asked, changed])
async def test_the_configuration_is_read_again(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, tell: Callable[..., Any]
) -> None:
    async with running(session, stack, fleet, {**PATIENT, **fleet.config()}) as (client, process):
        path = stack.directory / "scheduler_config.json"
        before = json.loads(read(path))
        new = {**before, **without(fleet, "decode-1"), "strategy": "round_robin", "queue_size": 7}
        async with load(client):
            await tell(client, process, path, {**new, "grpc_port": 1234})
            await until_states(client, decode_1="gone")
            assert (await client.admin("GET", "/strategy"))[1]["strategy"] == "round_robin"
            _, shown = await client.admin("GET", "/config")
            assert (shown["queue_size"], shown["grpc_port"]) == (7, 9002)
        texts = await events(client, "config")
        assert any(text.endswith("; needs a restart: grpc_port") for text in texts), texts
        assert any("strategy, queue_size changed" in text for text in texts), texts
        await process.says("the configuration was read again: decode_instances, strategy")
        # And a broken one.
        in_place(path, {**new, "queue_sise": 1, "strategy": "nonsense"})
        status, found = await client.admin("POST", "/reload")
        assert status == 422
        assert "queue_sise: unknown key; did you mean 'queue_size'?" in found["error"]
        assert "nonsense" in found["error"]
        process.signal(signal.SIGHUP)
        assert (await client.complete()).status == 200
        assert (await client.admin("GET", "/config"))[1]["queue_size"] == 7


def read(path: Path) -> str:
    return path.read_text()


async def test_a_drain_survives_a_reload(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any], instances: Path
) -> None:
    state_file = {"state_file": str(stack.directory / "state.json")}
    async with running(session, stack, fleet, {**settings, **state_file}) as (client, _):
        assert (await client.admin("POST", "/instances/decode-0/drain"))[0] == 202
        assert (await client.admin("DELETE", "/instances/decode-1"))[0] == 204
        write(instances, without(fleet, "decode-0"))
        await until_states(client, decode_0="gone")
        write(instances, fleet.config())
        await until_states(client, decode_0="draining", decode_1="gone")
        assert (await client.admin("POST", "/reload"))[0] == 200
        await until_states(client, decode_0="draining", decode_1="gone", decode_2="healthy")
    async with running(session, stack, fleet, {**settings, **state_file}) as (client, _):
        await until_states(client, decode_0="draining", decode_1="gone", decode_2="healthy")


async def test_a_terminal_that_is_closed_drains(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any]
) -> None:
    command = stack.serve(settings)
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it
        os.execv(command[0], command)
    ended = asyncio.get_running_loop().run_in_executor(None, os.waitpid, pid, 0)
    client = Client(session, stack, fleet)

    async def serves() -> bool:
        try:
            return (await client.admin("GET", "/readyz"))[0] == 200
        except aiohttp.ClientConnectionError:
            return False

    await until(serves)
    os.kill(pid, signal.SIGHUP)
    assert (await client.admin("GET", "/readyz"))[0] == 200
    os.close(terminal)
    async with asyncio.timeout(HUNG_S):
        _, status = await ended
    assert os.waitstatus_to_exitcode(status) == 0
