"""What several workers do: requests a second, CPU a request, and how the requests are spread.

``python -m benchmarks.workers``, in the clone. A fleet of engines that compute nothing stands behind a real
Envoy; ``up --workers N`` runs before it, for each N in turn, again and again, so that figures of one run can
be compared. Where there are cores enough, each worker is pinned to a core of its own, and Envoy, the engines
and the clients to others. Else they share all cores, and only CPU a request says what a worker could do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvloop
from tests.support.processes import unused_ports

from .routers import cpu
from .routers.load import Load
from .routers.routers import Fleet, _answers, _process, _until, _written, fleet
from .routers.run import machine
from .routers.workloads import Workload

ENVOYS_CORES, CLIENTS_CORES = 4, 2
"""Cores that are enough for one or two workers, where there are so many."""
WARM_UP_S = 1.0


@dataclass
class Figures:
    """What runs with a number of workers have shown, a value for each run."""

    requests_per_s: list[float] = field(default_factory=list)
    workers_ms: list[float] = field(default_factory=list)
    """CPU of all workers a request."""
    envoy_ms: list[float] = field(default_factory=list)
    parent_ms: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    least_share: list[float] = field(default_factory=list)
    """Of the requests, those of the worker with the fewest, times the number of workers: 1 is even."""


@dataclass(frozen=True)
class Running:
    """``up`` with its processes."""

    port: int
    admin: int
    parent: int
    workers: list[int]
    envoy: int

    def decisions(self) -> Counter[str]:
        """Return how many of the last decisions each worker has made."""
        url = f"http://127.0.0.1:{self.admin}/decisions?limit=1000"
        with urllib.request.urlopen(url, timeout=30) as response:
            found = json.load(response)["decisions"]
        return Counter((each["id"] or "?").partition(".")[0] for each in found)


@contextlib.contextmanager
def running(count: int, strategy: str, instances: Fleet, folder: Path) -> Iterator[Running]:
    """Run ``up`` with so many workers, pinned if there are cores enough."""
    port, prefill_port, admin_port, envoy_admin_port = unused_ports(4)
    config: dict[str, Any] = {"strategy": strategy}
    for role in ("prefill", "decode"):
        config[f"{role}_instances"] = [
            {"id": f"{role}-{number}", "host": "127.0.0.1", "port": each}
            for number, each in enumerate(getattr(instances, role))
        ]
    path = _written(folder / f"workers-{count}.json", config)
    command = [sys.executable, "-m", "vllm_pd_scheduler", "up", "--log-level=WARNING", f"--config={path}"]
    command += [f"--port={port}", f"--prefill-port={prefill_port}", f"--admin-port={admin_port}"]
    command += [f"--envoy-admin-port={envoy_admin_port}", f"--workers={count}"]
    log = folder / f"workers-{count}.log"
    with _process(command, log) as process:
        body = b'{"model": "fake-model", "prompt": "Hello", "max_tokens": 1}'
        _until(partial(_answers, port, "/v1/completions", body), process, log)
        found = _found(count, process, port, admin_port)
        pin(found)
        yield found


def _found(count: int, process: subprocess.Popen[bytes], port: int, admin: int) -> Running:
    children = {each.pid: each.cmdline() for each in psutil.Process(process.pid).children()}
    workers = [pid for pid, command in children.items() if "--worker" in command]
    (envoy,) = set(children) - set(workers)
    return Running(port, admin, process.pid, workers or [process.pid], envoy)


def cores_for(count: int) -> tuple[list[int], list[int], list[int]] | None:
    """Return the cores of so many workers, of Envoy, and of all others; ``None`` if there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count + ENVOYS_CORES + CLIENTS_CORES:
        return None
    return cores[:count], cores[count : count + ENVOYS_CORES], cores[count + ENVOYS_CORES :]


def pin(found: Running) -> None:
    """Pin each process to its cores, with all its threads, if there are enough."""
    cores = cores_for(len(found.workers))
    if cores is None:
        return
    for pid, core in zip(found.workers, cores[0], strict=True):
        _pin_all(pid, [core])
    _pin_all(found.envoy, cores[1])


def _pin_all(pid: int, cores: Sequence[int]) -> None:
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, cores)


async def measure(found: Running, clients: int, seconds: float, figures: Figures) -> None:
    """Put a load on it, and note what it shows."""
    workload = Workload("", "", "", clients, prompt=2_000, conversations=64)
    async with Load(found.port, clients) as load:
        await load.run(workload.body(), WARM_UP_S)
        before = _used(found)
        seen = await load.run(workload.body(), seconds)
        after = _used(found)
    if +seen.errors:
        raise SystemExit(f"{len(found.workers)} workers: {dict(seen.errors)}")
    done = len(seen.times)
    workers, envoy, parent = ((b - a) * 1e3 / done for a, b in zip(before, after, strict=True))
    shares = found.decisions() if len(found.workers) > 1 else Counter({"": done})
    figures.requests_per_s.append(done / seen.seconds)
    figures.workers_ms.append(workers)
    figures.envoy_ms.append(envoy)
    figures.parent_ms.append(parent)
    figures.p50_ms.append(seen.p50 * 1e3)
    fewest = min(shares.values()) if len(shares) >= len(found.workers) else 0
    figures.least_share.append(fewest * len(found.workers) / sum(shares.values()))


def _used(found: Running) -> tuple[float, float, float]:
    """Return the CPU seconds of the workers, of Envoy and of the parent, without its children."""
    workers = sum(map(_cpu, found.workers))
    parent = 0.0 if found.parent in found.workers else _cpu(found.parent)
    return workers, cpu.cpu_seconds(found.envoy), parent


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, with commas")
    parser.add_argument("--strategy", default="predicted_latency")
    parser.add_argument("--instances", type=int, default=4, help="P, and as many D")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    counts = [int(each) for each in options.workers.split(",")]
    found = {count: Figures() for count in counts}
    pinned = cores_for(max(counts))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-workers-")))
        others = pinned[2] if pinned is not None else list(os.sched_getaffinity(0))
        with on(others):
            instances = stack.enter_context(fleet(options.instances, folder))
        for _ in range(options.runs):
            for count in counts:
                with running(count, options.strategy, instances, folder) as up, on(others):
                    uvloop.run(measure(up, options.clients, options.seconds, found[count]))
    where = "each worker, Envoy and the rest on cores of their own" if pinned else "all on the same cores"
    runs = f"medians of {options.runs} interleaved runs of {options.seconds:g} s"
    print(f"{machine()}; {options.clients} clients, {options.strategy}; {where}; {runs}\n")
    print(_table(found, counts[0]))


@contextlib.contextmanager
def on(cores: Sequence[int]) -> Iterator[None]:
    """Run a block, and what is started in it, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _table(found: dict[int, Figures], first: int) -> str:
    heads = ("workers", "requests/s", f"times {first}", "workers' CPU, ms a request", "Envoy's", "parent's")
    lines = ["| " + " | ".join((*heads, "p50, ms", "least share")) + " |", "|---" * (len(heads) + 2) + "|"]
    for count, each in found.items():
        pairs = zip(found[first].requests_per_s, each.requests_per_s, strict=True)
        cells = (
            f"{count}",
            f"{median(each.requests_per_s):.0f}",
            f"{median(b / a for a, b in pairs):.2f}",
            f"{median(each.workers_ms):.3f}",
            f"{median(each.envoy_ms):.3f}",
            f"{median(each.parent_ms):.3f}",
            f"{median(each.p50_ms):.1f}",
            f"{median(each.least_share):.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
