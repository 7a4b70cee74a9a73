"""A worker that dies or hangs is a non-event to clients and operators."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import pytest

from tests.support.load import load
from tests.support.processes import Client, Process, Stack
from tests.support.waiting import until
from tests.support.workers import (
    WORKERS,
    client,
    counts,
    fleet,
    pids,
    reachable,
    requests,
    settings,
    split_by_all,
    stack,
    started_again,
    up,
)

__all__ = ["client", "fleet", "settings", "stack", "up"]


@pytest.mark.parametrize("dead", WORKERS)
async def test_one_that_is_killed_is_a_non_event(client: Client, up: Process, dead: str) -> None:
    async with load(client) as seen:
        await seen.more()
        before, pid = await counts(client), pids(up)[dead]
        os.kill(pid, signal.SIGKILL)
        await reachable(client)
        await seen.more()
        meanwhile = await counts(client)
        await started_again(up, dead, pid)
        await seen.more(60)
    seen.assert_clean()
    after = await counts(client)
    await up.says(f"worker {dead} (process {pid}) was ended by SIGKILL")
    for name, value in before.items():
        assert meanwhile[name] >= value, f"{name} has fallen"
        assert after[name] >= meanwhile[name], f"{name} has fallen"
    await split_by_all(client)
    await client.until_in_flight(0)


async def test_the_counts_are_exact_after_a_death(client: Client, up: Process) -> None:
    """What was told before a worker has died is told afterwards, once."""
    before = requests(await counts(client))
    for number, dead in enumerate(("w1", "w0", "w1"), 1):
        for _ in range(10):
            await client.complete()

        async def told(expected: float = before + 10 * number) -> bool:
            return requests(await counts(client)) == expected

        await until(told)
        pid = pids(up)[dead]
        served = up.output.count(f"worker {dead}: serving")
        os.kill(pid, signal.SIGKILL)
        await reachable(client)
        assert requests(await counts(client)) == before + 10 * number
        await until(lambda dead=dead, served=served: up.output.count(f"worker {dead}: serving") > served)
        await split_by_all(client)
        before = requests(await counts(client)) - 10 * number


async def test_one_that_hangs_holds_up_no_operator(client: Client, up: Process) -> None:
    for _ in range(4):
        await client.complete()
    before = await counts(client)
    pid = pids(up)["w1"]
    os.kill(pid, signal.SIGSTOP)
    try:
        found = await counts(client)
        assert requests(found) >= requests(before)
        assert (await client.admin("GET", "/decisions"))[0] == 200
        assert (await client.admin("GET", "/status"))[0] == 200
        async with load(client, clients=2) as seen:
            await seen.more()
        seen.assert_clean()
    finally:
        with contextlib.suppress(ProcessLookupError):  # it is ended if that took long
            os.kill(pid, signal.SIGCONT)
    await split_by_all(client)


async def test_the_first_that_hangs_is_ended_and_another_answers_operators(
    client: Client, up: Process
) -> None:
    await client.complete()
    pid = pids(up)["w0"]
    os.kill(pid, signal.SIGSTOP)
    async with load(client, clients=2) as seen:
        await until(lambda: pids(up).get("w0", pid) != pid)
        await reachable(client)
        await seen.more()
    seen.assert_clean()
    await started_again(up, "w0", pid)
    await split_by_all(client)
    assert f"worker w0 (process {pid}) hangs: it is ended" in up.output


async def test_one_that_is_started_again_is_where_envoy_knows_it(
    client: Client, up: Process, stack: Stack, settings: dict[str, Any]
) -> None:
    stack.write_config({**settings, "grpc_socket": "/tmp/elsewhere.sock", "strategy": "least_load"})
    for number, broken in enumerate((False, True), 1):
        if broken:
            stack.write_config({**settings, "nonsense": 1})
        pid = pids(up)["w1"]
        os.kill(pid, signal.SIGKILL)
        await until(lambda number=number: up.output.count("worker w1: serving") > number)
        await split_by_all(client)
    await up.says("ERROR w1 vllm_pd_scheduler.cli.serving: the configuration is as at the start")
