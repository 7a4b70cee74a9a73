"""What sharing costs a scheduler: CPU a request, alone and with other replicas that serve as much each.

``python -m benchmarks.replicas``, in the clone; it needs a ``redis-server`` or ``valkey-server``. One real
scheduler serves a real Envoy at a fixed rate, before a fleet of engines that compute nothing. It shares by a
real server with others, which are played by a process that tells for each what a scheduler with as many
requests does. Where it is alone, or has fewer others, as many are played for another fleet: a request takes
more CPU on cores that others use too, which is not to be put down to sharing. Set-ups are measured in turns,
so that figures of one run can be compared. ``--against PATH`` measures another clone in the same turns. All
of it runs on one machine, so the default rate is lower on one with few cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import uvloop
from tests.support.processes import unused_ports
from tests.support.valkey import running

from vllm_pd_scheduler.config.load import load_config
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot
from vllm_pd_scheduler.records.events import Events
from vllm_pd_scheduler.replicas import FleetKey, Replica
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.sync.channel import Change
from vllm_pd_scheduler.sync.greeting import Greeting
from vllm_pd_scheduler.sync.sync import Sync
from vllm_pd_scheduler.sync.valkey import Valkey

from .counts import counts
from .routers.load import Load
from .routers.routers import Fleet, _answers, _process, _until, _written, fleet
from .routers.run import machine
from .routers.workloads import Workload

WARM_UP_S = 3.0
_ROOT = Path(__file__).parents[1]
BLOCKS = 2
"""Of a prompt: those of this benchmark's 2 KB have as many."""
RATE, RATE_PER_CORE = 500.0, 75.0
"""Requests/s of each replica by default: less where so many for each core are less."""
PREFILL_S, DECODE_S = 0.008, 0.004
"""Seconds that the other replicas' requests spend on P and on D."""


# -- the other replicas


class Other:
    """A replica that serves so many requests a second, without Envoy and without instances."""

    def __init__(self, name: str, config: str, rate: float, seed: int) -> None:
        loaded = load_config(config)
        assert loaded.replicas is not None
        self._rate = rate
        self._registry = registry = Registry()
        for instance in loaded.instances():
            registry.probed(registry.add(instance), None)
        for endpoint in registry:
            registry.scraped(endpoint, MetricsSnapshot(0.0, 20.0, 0.0, 0.5, kv_capacity=1e6), 0)
        self._prefill = itertools.cycle(registry.endpoints(InstanceRole.PREFILL))
        self._decode = itertools.cycle(registry.endpoints(InstanceRole.DECODE))
        self._numbers = itertools.count(seed << 32)
        self._queued: deque[tuple[float, RequestContext, Any]] = deque()
        self._running: deque[tuple[float, Any]] = deque()
        self.sync = Sync(
            Replica(registry, name, FleetKey(loaded.replicas.meeting().fleet(loaded.replicas.key))),
            Valkey(loaded.replicas),
            Greeting(name, name, "benchmark", "0", {}),
            Events(time.time),
            waiting=lambda: (0, 0),
            news=_nothing,
            changed=_ignore,
        )

    async def serve(self) -> None:
        """Serve until this is cancelled."""
        due = time.monotonic()
        while True:
            due += 1.0 / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._go_on(time.monotonic())

    def _go_on(self, now: float) -> None:
        while self._running and self._running[0][0] <= now:
            self._running.popleft()[1].release(now)
        while self._queued and self._queued[0][0] <= now:
            _, context, claim = self._queued.popleft()
            self._registry.work.prefilled(claim, 500, 0, now)
            decode = next(self._decode)
            self._running.append((now + DECODE_S, self._registry.work.reserve(decode, context)))
        number = next(self._numbers)
        blocks = tuple((number * 1000 + n) * 0x9E3779B97F4A7C15 % (1 << 60) for n in range(BLOCKS))
        context = RequestContext(
            "/v1/completions", prompt_tokens=500.0, output_tokens=8.0, blocks=blocks, block_tokens=256.0,
            arrived=now, now=now,
        )  # fmt: skip
        self._queued.append(
            (now + PREFILL_S, context, self._registry.work.reserve(next(self._prefill), context))
        )


async def play(config: str, count: int, rate: float) -> None:
    """Be so many other replicas until this is cancelled."""
    others = [Other(f"other-{number}", config, rate, number + 1) for number in range(count)]
    await asyncio.gather(*(each.sync.run() for each in others), *(each.serve() for each in others))


def _nothing() -> None: ...


def _ignore(_: Change) -> None: ...


# -- the one that is measured


@contextlib.contextmanager
def scheduler(
    clone: Path,
    others: int,
    played: int,
    rate: float,
    strategy: str,
    instances: Fleet,
    folder: Path,
    url: str,
) -> Iterator[tuple[int, int]]:
    """Run a scheduler of a clone with its Envoy and so many others; give its port and process.

    So many are ``played`` in all: those that are not its own are of another fleet.
    """
    port, prefill_port, admin_port, envoy_admin_port = unused_ports(4)
    config: dict[str, Any] = {"strategy": strategy}
    for role in ("prefill", "decode"):
        config[f"{role}_instances"] = [
            {"id": f"{role}-{number}", "host": "127.0.0.1", "port": each}
            for number, each in enumerate(getattr(instances, role))
        ]
    shared = {**config, "replicas": {"url": url, "key": f"pd-{port}", "name": "measured"}}
    elsewhere = {**config, "replicas": {"url": url, "key": f"pd-{port}-elsewhere", "name": "nobody"}}
    path = _written(folder / f"{port}.json", shared if others else config)
    up = [*_python(clone), "-m", "vllm_pd_scheduler", "up", "--log-level=WARNING", f"--config={path}"]
    up += [f"--port={port}", f"--prefill-port={prefill_port}", f"--admin-port={admin_port}"]
    up += [f"--envoy-admin-port={envoy_admin_port}"]
    log = folder / f"{port}.log"
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_process(up, log))
        body = b'{"model": "fake-model", "prompt": "Hello", "max_tokens": 1}'
        _until(partial(_answers, port, "/v1/completions", body), process, log)
        log = folder / f"{port}-others.log"
        for count, of in ((others, path), (played - others, _written(folder / f"{port}-e.json", elsewhere))):
            if count:
                play_them = [*_python(clone), "-m", "benchmarks.replicas", f"--play={of}"]
                play_them += [f"--others={count}", f"--rate={rate}"]
                stack.enter_context(_process(play_them, log))
        if others:
            _until(partial(_hears, admin_port, others), process, log)
        yield port, process.pid


def _python(clone: Path) -> list[str]:
    """Return what runs Python with the package of a clone."""
    return ["env", f"PYTHONPATH={clone / 'extproc'}:{_ROOT}", sys.executable]


def _hears(admin: int, count: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{admin}/status", timeout=5) as response:
        return len(json.load(response)["replicas"]["others"]) == count


class Cost(NamedTuple):
    """CPU of a request, in ms."""

    scheduler: float
    whole: float
    """Envoy's too."""


async def measure(port: int, pid: int, rate: float, seconds: float) -> Cost:
    """Return the CPU that a request takes."""
    workload = Workload("", "", "", 32, prompt=2_000, conversations=64)
    async with Load(port, workload.clients) as load:
        await load.run(workload.body(), WARM_UP_S, rate=rate)
        before = _used(pid)
        seen = await load.run(workload.body(), seconds, rate=rate)
        used = _used(pid)
    if +seen.errors:
        raise SystemExit(f"errors: {dict(seen.errors)}")
    done = len(seen.times) / seen.seconds
    if done < 0.9 * rate:
        print(f"only {done:.0f} requests/s of {rate:.0f} were answered", flush=True)
    scheduler, whole = (1e3 * (b - a) / len(seen.times) for a, b in zip(before, used, strict=True))
    return Cost(scheduler, whole)


def _rate() -> float:
    """Return the requests/s that a machine with these cores should reach."""
    return min(RATE, RATE_PER_CORE * (os.cpu_count() or 1))


def _used(pid: int) -> Cost:
    """Return the CPU seconds of a process, and of it and its children."""
    children = [each.pid for each in psutil.Process(pid).children(recursive=True)]
    own = _cpu(pid)
    return Cost(own, own + sum(_cpu(each) for each in children))


def _cpu(pid: int) -> float:
    """Return the CPU seconds of all threads of a process, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in tasks) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas")
    parser.add_argument("--others", type=counts(0), default=[0, 1, 3], help="other replicas: 0,1,3")
    parser.add_argument("--rate", type=float, default=_rate(), help="requests/s of each replica")
    parser.add_argument("--strategy", default="predicted_latency")
    parser.add_argument("--instances", type=int, default=4, help="P, and as many D")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another clone, to compare with")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        uvloop.run(play(options.play, options.others[0], options.rate))
        return
    clones = {"": _ROOT}
    if options.against:
        clones[f" ({options.against.name})"] = options.against.resolve()

    found: dict[tuple[str, int], list[Cost]] = {(c, n): [] for c in clones for n in options.others}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-replicas-")))
        server = stack.enter_context(running(folder / "server"))
        instances = stack.enter_context(fleet(options.instances, folder))
        for run in range(options.runs):
            for clone, count in sorted(found, key=lambda each: each[1], reverse=bool(run % 2)):
                place = clones[clone], count, max(options.others), options.rate, options.strategy
                with scheduler(*place, instances, folder, server.url) as (port, pid):
                    cost = uvloop.run(measure(port, pid, options.rate, options.seconds))
                found[clone, count].append(cost)
                words = f"{run}{clone} {count}: {cost.scheduler:.3f}, with Envoy {cost.whole:.3f}"
                print(words, file=sys.stderr, flush=True)
    few = ", for want of cores" if options.rate == _rate() < RATE else ""
    rate = f"{options.rate:g} requests/s a replica{few}"
    print(f"{machine()}; {rate}, {options.strategy}; medians of {options.runs}\n")
    print("| other replicas | CPU, ms a request | times alone | with Envoy | times alone |")
    print("|---|---|---|---|---|")
    for (clone, count), costs in found.items():
        alone = found[clone, options.others[0]]
        columns = []
        for kind in (0, 1):
            ratio = median(b[kind] / a[kind] for a, b in zip(alone, costs, strict=True))
            columns.append(f"{median(each[kind] for each in costs):.3f} | {ratio:.3f}")
        print(f"| {count}{clone} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
