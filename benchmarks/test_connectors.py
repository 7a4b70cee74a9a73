"""What a request costs in each hand-off protocol: the scheduler's CPU and Envoy's, beside NIXL's in one run.

Real Envoy, real processes, simulated engines that take no time. Both stacks run all the while, and get their
requests in turns: ``REQUESTS`` a turn, ``TURNS`` turns.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil
import pytest
import uvloop
from tests.support.connectors import PROTOCOLS
from tests.support.processes import Client, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet

REQUESTS = int(os.environ.get("REQUESTS", "500"))
TURNS = int(os.environ.get("TURNS", "5"))
AT_A_TIME = 16
BODY = {"prompt": "What does a hand-off cost? " * 40, "max_tokens": 1}


@dataclass
class Running:
    """A stack with a fleet of one protocol."""

    client: Client
    scheduler: psutil.Process
    envoy: psutil.Process

    async def turn(self) -> tuple[float, float]:
        """Return the CPU of a request, in us, of the scheduler and of Envoy."""
        before = self._used()
        left = REQUESTS

        async def one_after_another() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                answer = await self.client.post("/v1/completions", BODY)
                assert answer.status == 200, answer
                assert "x-pd-prefill" in answer.headers

        await asyncio.gather(*(one_after_another() for _ in range(AT_A_TIME)))
        scheduler, envoy = (
            (now - then) / REQUESTS * 1e6 for now, then in zip(self._used(), before, strict=True)
        )
        return scheduler, envoy

    def _used(self) -> tuple[float, float]:
        scheduler, envoy = self.scheduler.cpu_times(), self.envoy.cpu_times()
        return scheduler.user + scheduler.system, envoy.user + envoy.system


@asynccontextmanager
async def running(protocol: str, directory: Path) -> AsyncIterator[Running]:
    """Start a fleet that speaks a protocol, and all before it."""
    stack = Stack(directory)
    with Fleet(2, 2, connector=protocol, arguments=["--instant"]) as fleet:  # type: ignore[arg-type]
        config = {"strategy": "round_robin", "metaserver_port": unused_ports(1)[0], **fleet.config()}
        with spawned(stack.serve(config)) as scheduler, spawned(stack.envoy()) as envoy:
            async with aiohttp.ClientSession() as session:
                client = Client(session, stack, fleet)
                await ready(client, envoy)
                await client.until_split()
                found = Running(client, *(psutil.Process(each.process.pid) for each in (scheduler, envoy)))
                await found.turn()
                yield found


async def measured(protocol: str, directories: tuple[Path, Path]) -> dict[str, float]:
    """Return the medians of a protocol's turns, and of those by NIXL between them."""
    async with running("nixl", directories[0]) as nixl, running(protocol, directories[1]) as own:
        turns = [(await nixl.turn(), await own.turn()) for _ in range(TURNS)]
    return {
        f"{part} {name}": median(turn[side][at] for turn in turns)
        for at, part in enumerate(("scheduler", "Envoy"))
        for side, name in enumerate(("by NIXL", "us"))
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_connector(benchmark: Any, protocol: str, tmp_path: Path) -> None:
    directories = tmp_path / "nixl", tmp_path / "own"
    for directory in directories:
        directory.mkdir()
    found = benchmark.pedantic(lambda: uvloop.run(measured(protocol, directories)), rounds=1)
    benchmark.extra_info.update(found)
    parts = []
    for part in ("scheduler", "Envoy"):
        own, nixl = found[f"{part} us"], found[f"{part} by NIXL"]
        times = own / nixl if nixl else math.nan  # CPU is told in steps of 10 ms
        parts.append(f"{part} {own:.0f} us, {times:.2f} of NIXL's")
    print(f"\n{protocol:16}", "; ".join(parts))
