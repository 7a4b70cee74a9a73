"""What an operator changed: drains that are waited for and undone, and what a restart must bring back."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.overload import PATIENT
from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

TORN = '{"version": 1, "drained": ["decode'


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2) as running:
        yield running


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


@pytest.fixture
def settings(fleet: Fleet, state_file: Path) -> dict[str, Any]:
    return {**PATIENT, **fleet.config(), "state_file": str(state_file)}


def read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def write(path: Path, text: str) -> None:
    path.write_text(text)


async def serving(client: Client, process: Process) -> None:
    """Wait until the scheduler, without an Envoy, is ready."""

    async def is_ready() -> bool:
        assert process.process.poll() is None, process.output
        try:
            return (await client.admin("GET", "/readyz"))[0] == 200
        except aiohttp.ClientConnectionError:
            return False

    await until(is_ready)


async def kill(process: Process) -> None:
    process.signal(signal.SIGKILL)
    await asyncio.to_thread(process.wait)


async def test_changes_survive_a_kill(
    session: aiohttp.ClientSession,
    stack: Stack,
    fleet: Fleet,
    settings: dict[str, Any],
    state_file: Path,
) -> None:
    client = Client(session, stack, fleet)
    third = {"id": "third", "role": "decode", "host": "localhost", "port": fleet["decode-1"].port}
    with spawned(stack.serve(settings)) as scheduler:
        await serving(client, scheduler)
        assert read(state_file) is None, "nothing was changed"
        for method, path, body, expected in (
            ("PUT", "/strategy", {"strategy": "weighted"}, 200),
            ("POST", "/instances", {**third, "api_key": {"env": "THIRD_KEY"}}, 400),
            ("POST", "/instances", third, 201),
            ("POST", "/instances/decode-0/drain", None, 202),
            ("DELETE", "/instances/prefill-1", None, 204),
        ):
            assert (await client.admin(method, path, body))[0] == expected, path
        await kill(scheduler)
    with spawned(stack.serve(settings)) as scheduler:
        await serving(client, scheduler)
        assert (await client.admin("GET", "/strategy"))[1]["strategy"] == "weighted"
        states = {name: str(state) for name, state in (await client.states()).items()}
        assert states.keys() == {"prefill-0", "decode-0", "decode-1", "third"}
        assert states["decode-0"] == "draining"
        assert states["third"] == "healthy"
        await scheduler.says("removed prefill-1")
        # And back again, which leaves nothing to keep.
        first = {"id": "prefill-1", "role": "prefill", "host": "127.0.0.1"}
        first["port"] = fleet["prefill-1"].port
        for method, path, body, expected in (
            ("PUT", "/strategy", {"strategy": "least_load"}, 200),
            ("POST", "/instances/decode-0/undrain", None, 200),
            ("DELETE", "/instances/third", None, 204),
            ("POST", "/instances", first, 201),
        ):
            assert (await client.admin(method, path, body))[0] == expected, path
        expected = {"version": 1, "removed": [], "added": [], "drained": []}
        assert json.loads(read(state_file) or "") == expected


async def test_a_file_that_is_none_of_ours_is_put_aside(
    session: aiohttp.ClientSession,
    stack: Stack,
    fleet: Fleet,
    settings: dict[str, Any],
    state_file: Path,
) -> None:
    client = Client(session, stack, fleet)
    write(state_file, TORN)
    with spawned(stack.serve(settings)) as scheduler:
        await serving(client, scheduler)
        assert set((await client.states()).values()) == {"healthy"}
        await scheduler.says("WARNING")
        (warning,) = (line for line in scheduler.lines() if "WARNING" in line)
        assert f"state_file {state_file}: Invalid JSON" in warning
        assert "Traceback" not in scheduler.output
        assert read(Path(f"{state_file}.corrupt")) == TORN
        await client.admin("POST", "/instances/decode-0/drain")
        await kill(scheduler)
    with spawned(stack.serve(settings)) as scheduler:
        await serving(client, scheduler)
        assert (await client.instance("decode-0"))["drained"] is True


async def test_a_place_that_does_not_exist_is_said_at_the_start(stack: Stack, fleet: Fleet) -> None:
    missing = stack.directory / "missing"
    settings = {**fleet.config(), "state_file": str(missing / "state.json")}
    with spawned(stack.serve(settings)) as scheduler:
        assert await asyncio.to_thread(scheduler.wait) == 2
        assert f"state_file: there is no directory {missing}" in scheduler.output


async def test_a_drain_is_waited_for_and_undone(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any]
) -> None:
    client = Client(session, stack, fleet)
    with spawned(stack.up(settings)) as process:
        await ready(client, process)
        async with client.held_stream() as stream:
            names = [stream.headers[f"x-pd-{role}"] for role in ("prefill", "decode")]
            others = [instance.id for instance in fleet.instances if instance.id not in names]
            for name in others:  # idle: nothing to wait for, whatever runs elsewhere
                status, found = await client.admin("POST", f"/instances/{name}/drain?wait=true")
                assert (status, found["drained"]) == (200, True)
                await client.admin("POST", f"/instances/{name}/undrain")
            assert (await client.instance(names[0]))["pending_handoffs"] == 1
            drains = [
                asyncio.ensure_future(client.admin("POST", f"/instances/{name}/drain?wait=true"))
                for name in names
            ]

            async def draining() -> bool:
                states = await client.states()
                return {states[name] for name in names} == {"draining"}

            await until(draining)
            assert not any(call.done() for call in drains), "the stream runs still"
            assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
        for status, found in await asyncio.gather(*drains):
            assert (status, found["drained"]) == (200, True)

        async def told() -> bool:
            return await _health(client, names[1]) == "DRAINING"

        await until(told)
        for name in names:
            status, found = await client.admin("POST", f"/instances/{name}/undrain")
            assert (status, found["state"], found["drained"]) == (200, "healthy", False)

        async def healthy() -> bool:
            return all([await _health(client, name) == "HEALTHY" for name in names])

        await until(healthy)
        used: set[str] = set()

        async def used_again() -> bool:
            answer = await client.complete()
            used.update((answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]))
            return used.issuperset(names)

        await until(used_again)
        assert "Traceback" not in process.output


async def test_a_drain_tells_what_remained_after_its_timeout(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any]
) -> None:
    client = Client(session, stack, fleet)
    with spawned(stack.up({**settings, "drain_timeout": 0.2})) as process:
        await ready(client, process)
        async with client.held_stream() as stream:
            for role, remaining in (
                ("decode", {"in_flight": 1, "pending_handoffs": 0}),
                ("prefill", {"in_flight": 0, "pending_handoffs": 1}),
            ):
                name = stream.headers[f"x-pd-{role}"]
                status, found = await client.admin("POST", f"/instances/{name}/drain?wait=true")
                assert (status, found["drained"], found["remaining"]) == (200, False, remaining)
            assert (await stream.rest()).endswith(b"data: [DONE]\n\n"), "it is not cut"


async def test_a_scheduler_that_ends_tells_those_who_wait(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any]
) -> None:
    client = Client(session, stack, fleet)
    with spawned(stack.up({**settings, "drain_timeout": 60})) as process:
        await ready(client, process)
        async with client.held_stream() as stream:
            name = stream.headers["x-pd-decode"]
            call = asyncio.ensure_future(client.admin("POST", f"/instances/{name}/drain?wait=true"))

            async def draining() -> bool:
                return (await client.states())[name] == "draining"

            await until(draining)
            process.signal(signal.SIGTERM)
            status, found = await call
            assert (status, found["drained"], found["remaining"]["in_flight"]) == (200, False, 1)
            assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.to_thread(process.wait) == 0


async def _health(client: Client, name: str) -> str:
    """Return the EDS health that Envoy knows of an instance."""
    instance = client.fleet[name]
    return (await client.envoy_hosts())[f"{instance.role} 127.0.0.1:{instance.port}"]
