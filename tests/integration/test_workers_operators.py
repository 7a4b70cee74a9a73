"""Several workers are one scheduler to operators, whichever of them is asked."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from tests.support.workers import (
    WORKERS,
    all_use,
    client,
    deciders,
    fleet,
    pids,
    reachable,
    settings,
    split_by_all,
    stack,
    started_again,
    up,
)

__all__ = ["client", "fleet", "settings", "stack", "up"]


async def test_an_advice_is_made_of_the_traffic_of_all(session: aiohttp.ClientSession, stack: Stack) -> None:
    with (
        Fleet(1, 1, arguments=["--decode-base=0.02"]) as fleet,
        spawned([*stack.up({"health_check_interval": 0.2, **fleet.config()}), "--workers=2"]) as process,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        sent = 0

        async def counted() -> bool:
            nonlocal sent
            answers = [client.complete(max_tokens=20, ignore_eos=True) for _ in range(4)]
            sent += len(await asyncio.gather(*answers))
            _, found = await client.admin("GET", "/advice?minutes=15")
            return str(found["text"]).startswith(f"not enough traffic seen: {sent} requests")

        await until(counted)
        assert len(await deciders(client, sent)) == 2


async def test_a_decision_of_any_worker_is_explained(client: Client) -> None:
    for _ in range(4):
        answer = await client.complete()
        request = answer.headers["x-request-id"]
        _, found = await client.admin("GET", f"/decisions?request_id={request}")
        (decision,) = found["decisions"]
        assert decision["prefill"]["picked"] == answer.headers["x-pd-prefill"]
    assert len(await deciders(client, 4)) == 2


async def test_decisions_can_be_followed(client: Client) -> None:
    _, found = await client.admin("GET", "/decisions?limit=1")
    last = found["decisions"][0]["number"] if found["decisions"] else 0
    for _ in range(6):
        sent = [(await client.complete()).headers["x-request-id"] for _ in range(3)]
        _, found = await client.admin("GET", f"/decisions?since={last}")
        numbers = [each["number"] for each in found["decisions"]]
        assert [each["request_id"] for each in found["decisions"]] == sent[::-1]
        assert numbers == sorted(numbers, reverse=True)
        last = numbers[0]


async def test_what_an_operator_changes_counts_at_all_and_outlives_the_first(
    client: Client, up: Process, tmp_path: Path
) -> None:
    changed = {"strategy": "least_load"}
    assert (await client.admin("PUT", "/strategy", changed))[0] == 200
    assert (await client.admin("POST", "/instances/decode-0/drain"))[0] == 202
    await all_use(client, "least_load")
    pid = pids(up)["w0"]
    os.kill(pid, signal.SIGKILL)
    await reachable(client)
    assert (await client.admin("GET", "/strategy"))[1]["strategy"] == "least_load"
    await started_again(up, "w0", pid)
    await split_by_all(client)
    await all_use(client, "least_load")
    for _ in range(10):
        assert (await client.complete()).headers["x-pd-decode"] == "decode-1"
    assert (await client.admin("POST", "/instances/decode-0/undrain"))[0] == 200

    def kept() -> bool:
        state = json.loads((tmp_path / "state.json").read_text())
        return bool(state["strategy"] == "least_load" and not state["drained"])

    await until(kept)
    assert "corrupt" not in up.output


async def test_sighup_and_reload_reach_all(
    client: Client, up: Process, stack: Stack, settings: dict[str, Any]
) -> None:
    up.signal(signal.SIGHUP)
    said = "INFO {} vllm_pd_scheduler.records.events: the configuration was read again: nothing has changed"
    await until(lambda: all(said.format(worker) in up.output for worker in WORKERS))
    stack.write_config({**settings, "prefill_timeout": 55.5})
    assert (await client.admin("POST", "/reload"))[0] == 200
    said = (
        "INFO {} vllm_pd_scheduler.records.events: the configuration was read again: prefill_timeout changed"
    )
    await until(lambda: all(said.format(worker) in up.output for worker in WORKERS))
    assert "(by admin 127.0.0.1)" in up.output
    assert "(by admin )" not in up.output
    said = "INFO {} vllm_pd_scheduler.records.events: log level is DEBUG"

    async def all_write_more() -> bool:
        """One that does not answer the first one in time has not heard it."""
        assert (await client.admin("PUT", "/log-level", {"level": "DEBUG"}))[0] == 200
        return all(said.format(worker) in up.output for worker in WORKERS)

    await until(all_write_more)


async def test_events_and_the_trace_are_of_all(client: Client) -> None:
    _, found = await client.admin("GET", "/events")
    started = [each["text"] for each in found["events"] if each["kind"] == "started"]
    assert sorted(text.partition(":")[0] for text in started) == ["worker w0", "worker w1"]
    headers = {"accept": "text/event-stream"}
    lines: list[dict[str, Any]] = []

    async def read(answer: aiohttp.ClientResponse) -> None:
        async for line in answer.content:
            if line.startswith(b"data: "):
                lines.append(json.loads(line[6:]))

    async with client.session.get(f"{client.stack.admin}/trace", headers=headers) as answer:
        reading = asyncio.ensure_future(read(answer))

        async def recorded() -> bool:
            for _ in range(4):
                await client.complete()
            return len(lines) >= 20

        await until(recorded)
        reading.cancel()
    _, found = await client.admin("GET", "/history")
    assert found["interval_s"] > 0
