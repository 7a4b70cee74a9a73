"""What a request and a token cost through a gateway, beside our own Envoy: the scheduler's and Envoy's CPU.

The same requests go through the scheduler by ``envoy/envoy.yaml`` (BUFFERED), by ``envoy/gateway.yaml``
(FULL_DUPLEX_STREAMED), and by that with ``response_body_mode: NONE``. Each has a scheduler and an Envoy of
its own; their turns alternate. What they use while idle is left out. A token's cost is what a stream of
``TOKENS`` costs more than an answer of one token. ``SECONDS_A_TURN`` and ``TURNS`` say how long it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from benchmarks.routers import routers
from benchmarks.routers.cpu import cpu_seconds
from benchmarks.routers.load import Body, Load
from tests.support.gateway import Gateway, GatewayStack
from tests.support.processes import Stack, spawned
from tests.support.waiting import until

CLIENTS = 16
SECONDS = float(os.environ.get("SECONDS_A_TURN", "2"))
TURNS = int(os.environ.get("TURNS", "5"))
TOKENS = int(os.environ.get("TOKENS", "100"))
PROMPT = int(os.environ.get("PROMPT", "2000"))
BUFFERED, DUPLEX, NO_BODY = "BUFFERED", "FULL_DUPLEX_STREAMED", "response body NONE"
PARTS = ("scheduler", "envoy")


@dataclass(frozen=True)
class Way:
    """A way to the fleet that runs."""

    port: int
    pids: dict[str, int]

    def used(self) -> dict[str, float]:
        return {name: cpu_seconds(pid) for name, pid in self.pids.items()}


def test_gateway(benchmark: Any) -> None:
    costs = benchmark.pedantic(measure, rounds=1)
    for mode, found in costs.items():
        for what, us in found.items():
            benchmark.extra_info[f"{mode}: {what}"] = us
            print(f"\n{mode:22} {what:24} {us:8.1f} us of CPU", end="")
    print()
    assert set(costs) == {BUFFERED, DUPLEX, NO_BODY}


def measure() -> dict[str, dict[str, float]]:
    """Return microseconds of CPU, by mode and by what they are for."""
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with contextlib.ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="pd-benchmark-")))
        fleet = running.enter_context(routers.fleet(1, folder))
        ways = {mode: running.enter_context(way(mode, fleet, folder)) for mode in (BUFFERED, DUPLEX, NO_BODY)}
        for _ in range(TURNS):
            for mode, each in ways.items():
                whole = uvloop.run(one(each, 1, 0))
                stream = uvloop.run(one(each, TOKENS, TOKENS))
                for part in PARTS:
                    samples[mode][f"{part}, a request"].append(whole[part])
                    samples[mode][f"{part}, a token"].append((stream[part] - whole[part]) / TOKENS)
    return {mode: {what: median(each) for what, each in found.items()} for mode, found in samples.items()}


async def one(way: Way, tokens: int, stream: int) -> dict[str, float]:
    """Return what a request costs by part, in microseconds."""
    async with Load(way.port, CLIENTS) as load:
        await load.run(body(tokens, stream), 0.2, stream)
        before = way.used()
        seen = await load.run(body(tokens, stream), SECONDS, stream)
        after = way.used()
        await asyncio.sleep(SECONDS / 2)
        idle = way.used()
    assert not +seen.errors, seen.errors
    background = {part: (idle[part] - after[part]) * seen.seconds / (SECONDS / 2) for part in PARTS}
    used = {part: after[part] - before[part] - background[part] for part in PARTS}
    return {part: each / len(seen.times) * 1e6 for part, each in used.items()}


def body(tokens: int, stream: int) -> Body:
    rest = json.dumps({"max_tokens": tokens, "stream": bool(stream)}).encode()[1:]
    return lambda number: (b'{"model": "fake-model", "prompt": "%012d' % number, b"p" * PROMPT, b'", ', rest)


@contextlib.contextmanager
def way(mode: str, fleet: routers.Fleet, folder: Path) -> Iterator[Way]:
    """Run a scheduler, and an Envoy that asks it in a mode, until the block ends."""
    directory = folder / mode.replace(" ", "-")
    directory.mkdir()
    config: dict[str, Any] = {"strategy": "round_robin"}
    for role in ("prefill", "decode"):
        hosts = [{"id": f"{role}-{port}", "host": "127.0.0.1", "port": port} for port in getattr(fleet, role)]
        config[f"{role}_instances"] = hosts
    stack: Stack
    if mode == BUFFERED:
        stack = Stack(directory)
        port = stack.ports.ingress
    else:
        gateway = Gateway(response_body="NONE" if mode == NO_BODY else "FULL_DUPLEX_STREAMED")
        stack = GatewayStack(directory, gateway=gateway)
        port = stack.port
    with spawned(stack.serve(config)) as scheduler, spawned(stack.envoy()) as envoy:
        pids = {"scheduler": scheduler.process.pid, "envoy": envoy.process.pid}
        wait_until_split(port, fleet)
        yield Way(port, pids)


def wait_until_split(port: int, fleet: routers.Fleet) -> None:
    """Wait until requests through a port have a hand-off."""

    async def ask() -> bool:
        before = fleet.counts()["hand_offs"]
        with contextlib.suppress(OSError):
            async with Load(port, 1) as load:
                await load.run(body(1, 0))
        return fleet.counts()["hand_offs"] > before

    uvloop.run(until(ask))
