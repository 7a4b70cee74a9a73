"""The operators' commands and events of a real scheduler: from its start to its end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.processes import Client, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until


async def run(stack: Stack, *arguments: str) -> tuple[int | None, str]:
    """Run an operator's command as a process; return its exit status and what it printed."""
    command = [sys.executable, "-m", "vllm_pd_scheduler", *arguments, "--url", stack.admin]
    ended = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(HUNG_S):
        printed, _ = await ended.communicate()
    return ended.returncode, printed.decode()


async def test_from_start_to_end(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    with Fleet(1, 2) as fleet, spawned(stack.serve(fleet.config())) as scheduler:
        client = Client(session, stack, fleet)

        async def serves() -> bool:
            assert scheduler.process.poll() is None, scheduler.output
            return (await run(stack, "status"))[0] == 0

        await until(serves)
        _, text = await run(stack, "events", "--json")
        past = json.loads(text)["events"]
        started = next(event for event in past if event["kind"] == "started")
        assert started["by"] == "start"
        assert started["text"].endswith(f"admin on 127.0.0.1:{stack.admin_port}")
        assert {(event["subject"], event["by"]) for event in past if event["kind"] == "state"} == {
            (name, "probe") for name in ("prefill-0", "decode-0", "decode-1")
        }
        headers = {"accept": "text/event-stream", "last-event-id": str(past[0]["number"])}
        async with session.get(f"{stack.admin}/events", headers=headers) as stream:
            assert await run(stack, "drain", "decode-0", "--wait") == (0, "decode-0 is drained\n")
            assert await run(stack, "remove", "decode-0") == (0, "decode-0 was removed\n")
            assert (await run(stack, "drain", "decode-1"))[0] == 1, "it is the last one"
            fleet.kill("decode-1")

            async def unhealthy() -> bool:
                return (await client.states())["decode-1"] == "unhealthy"

            await until(unhealthy)
            scheduler.signal(signal.SIGTERM)
            async with asyncio.timeout(HUNG_S):
                lines = (await stream.content.read()).decode().splitlines()
        assert await asyncio.to_thread(scheduler.wait) == 0
        events: list[dict[str, Any]] = [json.loads(each[6:]) for each in lines if each.startswith("data: ")]
        told = [(event["kind"], event["subject"], event["by"].split()[0]) for event in events]
        assert told == [
            ("state", "decode-0", "admin"),  # draining
            ("state", "decode-0", "admin"),  # drained
            ("state", "decode-0", "admin"),  # removed
            ("state", "decode-1", "probe"),  # unhealthy
            ("draining", None, "signal"),
        ]
        for event in (*past, *events):
            assert f" {event['level']} " in scheduler.output
            assert event["text"] in scheduler.output
        assert await run(stack, "status") == (
            3,
            f"vllm-pd-scheduler: the scheduler at {stack.admin} cannot be reached: Connection refused. "
            "Does it run there? Give its address by --url or PD_SCHEDULER_URL\n",
        )
