"""What ``up`` prints while nobody reads it: no request waits for that."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import NO_EJECTION, Client, Process, Stack
from tests.support.sim_fleet import Fleet
from tests.support.template import start
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

REQUESTS = 300


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, profile=EngineProfile.instant()) as running:
        yield running


@contextmanager
def unread(command: list[str]) -> Iterator[tuple[Process, int]]:
    """Run a command whose output goes to one pipe, and return what reads it."""
    read, write = os.pipe()
    with open(write, "wb") as output:
        popen = start(command, output, dict(os.environ))
    try:
        with open(read, "rb", buffering=0) as pipe:
            yield Process(popen, pipe), read
    finally:
        popen.kill()
        popen.wait()


def fill(read: int) -> None:
    """Leave a pipe no room."""
    write = os.open(f"/dev/fd/{read}", os.O_WRONLY | os.O_NONBLOCK)
    with open(write, "wb", buffering=0) as pipe:
        while pipe.write(b"\n"):
            pass


async def test_requests_are_served_and_it_ends(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    """Far more than a pipe holds, of our own log and of Envoy's: its access log and its warnings."""
    stack = Stack(tmp_path)
    command = [*stack.up({**fleet.config(), **NO_EJECTION}), "--log-level=DEBUG"]
    with unread(command) as (process, read):
        client = Client(session, stack, fleet)

        async def healthy() -> bool:
            try:
                return (await client.send("GET", "/health")).status == 200
            except aiohttp.ClientConnectionError:
                return False

        await until(healthy)
        fill(read)
        await client.fault("prefill-0", status=500)
        for _ in range(REQUESTS // 50):
            answers = await asyncio.gather(*(client.complete() for _ in range(50)))
            assert {answer.status for answer in answers} == {200}
        await client.fault("prefill-0")
        assert "x-pd-prefill" in (await client.complete()).headers
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0


async def test_what_was_dropped_is_counted_and_said(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    stack = Stack(tmp_path)
    long = "/v1/models/" + "x" * 4000  # in the access log
    with unread(stack.up(fleet.config())) as (_, read):
        client = Client(session, stack, fleet)

        async def dropped() -> bool:
            try:
                await asyncio.gather(*(client.send("GET", long) for _ in range(50)))
                _, page = await client.admin("GET", "/metrics")
            except aiohttp.ClientConnectionError:
                return False
            return "pd_scheduler_log_lines_dropped_total 0.0" not in page

        await until(dropped)
        said = b"lines of standard error were dropped while nobody read it"
        found = b""
        while said not in found:
            found += await asyncio.to_thread(os.read, read, 1 << 16)
