"""Several workers start together or not at all, and end together."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.overload import PATIENT
from tests.support.processes import Client, Process, Stack, ready, running, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from tests.support.workers import (
    client,
    fleet,
    pids,
    settings,
    split_by_all,
    stack,
    up,
)

__all__ = ["client", "fleet", "settings", "stack", "up"]


async def test_sigterm_drains_all(session: aiohttp.ClientSession, stack: Stack, tmp_path: Path) -> None:
    with (
        Fleet(1, 1) as fleet,
        spawned([*stack.up({**PATIENT, **fleet.config()}), "--workers=2"]) as process,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        await split_by_all(client)
        children = process.children()
        async with contextlib.AsyncExitStack() as held:
            streams = [await held.enter_async_context(client.held_stream()) for _ in range(4)]
            process.signal(signal.SIGTERM)
            await until(lambda: process.output.count("requests in flight") == 2)
            for stream in streams:
                assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.to_thread(process.wait) == 0
        assert not any(map(running, children))
        assert "Traceback" not in process.output


async def test_one_without_requests_stays_in_a_drain_as_long_as_another_has_some(
    session: aiohttp.ClientSession, stack: Stack
) -> None:
    body = {"prompt": "p", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with (
        Fleet(1, 2, arguments=["--decode-base=0.02"]) as fleet,
        spawned([*stack.up({**PATIENT, **fleet.config()}), "--workers=2"]) as process,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        await split_by_all(client)
        async with session.post(stack.url + "/v1/completions", json=body) as answer:
            await answer.content.readline()
            process.signal(signal.SIGTERM)
            await until(lambda: process.output.count("requests in flight") == 2)
            answers = [await client.complete() for _ in range(8)]
            assert len(pids(process)) == 2
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert all("x-pd-prefill" in each.headers for each in answers)
        assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in process.output


async def test_a_second_signal_ends_the_drain(session: aiohttp.ClientSession, stack: Stack) -> None:
    with (
        Fleet(1, 1) as fleet,
        spawned([*stack.up({**PATIENT, **fleet.config(), "drain_timeout": 600}), "--workers=2"]) as process,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        async with client.held_stream():
            process.signal(signal.SIGTERM)
            await until(lambda: process.output.count("requests in flight") == 2)
            process.signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait) == 0


async def test_when_the_parent_is_killed_all_end(client: Client, up: Process) -> None:
    children = up.children()
    assert len(children) == 3, "two workers and an Envoy"
    up.signal(signal.SIGKILL)
    await until(lambda: not any(map(running, children)))


async def test_one_that_cannot_start_says_why_once(stack: Stack, settings: dict[str, Any]) -> None:
    command = stack.serve(settings)
    with (
        socket.create_server(("127.0.0.1", stack.admin_port)),
        spawned([*command[:3], "serve", *command[3:], "--workers=2"]) as process,
    ):
        assert await asyncio.to_thread(process.wait) == 1
        assert process.output.count("admin_port: cannot listen") == 1, process.output
        assert "Traceback" not in process.output


async def test_ports_that_cannot_be_are_refused(stack: Stack, settings: dict[str, Any]) -> None:
    grpc = stack.ports.grpc
    for other, said in (
        ({"metrics_port": grpc + 1}, f"grpc_port of worker w1: 127.0.0.1:{grpc + 1} is where metrics_port"),
        ({"metaserver_port": 65535}, "metaserver_port of worker w1 would be 65536"),
    ):
        command = stack.serve({**settings, **other})
        with spawned([*command[:3], "serve", *command[3:], "--workers=2"]) as process:
            assert await asyncio.to_thread(process.wait) == 1
            assert said in process.output
