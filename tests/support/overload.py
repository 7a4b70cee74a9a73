"""A small stack whose instances can be held up: requests wait in the scheduler until they are let go."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.processes import Answer, Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until

# An instance that is held up stays healthy: its probes wait as long as it takes.
PATIENT = {"health_check_interval": 60.0, "health_check_timeout": 60.0, "decode_first_byte_timeout": 60.0}


class Overload:
    """A client's view of a stack under overload."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.fleet = client.fleet

    async def metrics(self) -> dict[str, float]:
        """Return every sample of the scheduler's own metrics, by name and labels."""
        _, page = await self.client.admin("GET", "/metrics")
        lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    async def waiting(self) -> int:
        """Return how many requests wait in the scheduler."""
        found = await self.metrics()
        return int(
            sum(value for name, value in found.items() if name.startswith("pd_scheduler_queue_requests"))
        )

    async def until_waiting(self, count: int) -> None:
        """Wait until so many requests wait."""

        async def reached() -> bool:
            return await self.waiting() == count

        await until(reached)

    def ask(self, prompt: str, headers: dict[str, str] | None = None, **body: Any) -> asyncio.Task[Answer]:
        """Send a completion request in the background."""
        document = {"prompt": prompt, "max_tokens": 4, **body}
        return asyncio.ensure_future(self.client.post("/v1/completions", document, headers))

    async def ask_in_turn(self, prompts: list[tuple[str, dict[str, str]]]) -> list[asyncio.Task[Answer]]:
        """Send requests, each when the one before waits in the scheduler."""
        tasks = []
        before = await self.waiting()
        for number, (prompt, headers) in enumerate(prompts, before + 1):
            tasks.append(self.ask(prompt, headers))
            await self.until_waiting(number)
        return tasks

    def held(self, *names: str) -> AbstractContextManager[None]:
        """Hold instances up while the block runs."""
        return self.client.frozen(*names)

    async def prompts_at(self, name: str) -> list[str]:
        """Return the prompts that an instance got, in the order in which it did."""
        return [json_body(each)["prompt"] for each in await self.client.seen(name) if each["body"]]


def json_body(seen: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a request that an instance got."""
    return dict(json.loads(seen["body"]))


@asynccontextmanager
async def overload(fleet: Fleet, directory: Path, **settings: Any) -> AsyncIterator[tuple[Overload, Process]]:
    """A scheduler with an Envoy of its own in front of a fleet, and the scheduler's process."""
    stack = Stack(directory)
    timeout = aiohttp.ClientTimeout(total=HUNG_S)
    with contextlib.ExitStack() as processes:
        process = processes.enter_context(spawned(stack.up({**PATIENT, **fleet.config(), **settings})))
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            client = Client(session, stack, fleet)
            await ready(client, process)
            yield Overload(client), process
            assert "Traceback" not in process.output, process.output
