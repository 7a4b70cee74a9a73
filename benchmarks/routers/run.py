"""Runs the workloads on all routers, interleaved, and gathers the figures."""

import contextlib
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import uvloop

from .figures import Figures
from .routers import ENVOY, Fleet, Router, fleet, router, versions
from .workloads import SETUPS, Setup, Workload

IDLE = "idle"
"""The name under which the memory of routers that have served hardly anything is kept."""
DIRECT = "direct"
"""The name of a client that sends the prefill to P and then the request to D itself."""


class Failed(Exception):
    """A request failed, or was not split: the figures of such a run say nothing."""


def measure(workloads: Sequence[Workload], names: Sequence[str], runs: int) -> Figures:
    """Measure these workloads with these routers, so many times each. Raise :exc:`Failed` at an error."""
    known = versions()
    today = time.strftime("%Y-%m-%d", time.gmtime())
    found = Figures(today, machine(), {each: known[each] for each in names})
    for setup in SETUPS:
        those = [each for each in workloads if each.setup is setup]
        if those:
            _measure_setup(setup, those, names, runs, found)
    return found


def _measure_setup(
    setup: Setup, workloads: Sequence[Workload], names: Sequence[str], runs: int, found: Figures
) -> None:
    with contextlib.ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="pd-benchmark-")))
        instances = running.enter_context(fleet(setup.instances, folder))
        routers = [
            running.enter_context(router(name, setup.strategies[name], instances, folder)) for name in names
        ]
        if setup is SETUPS[0]:
            for each in routers:
                found.add(IDLE, each.name, {"resident_mb": each.resident_mb()})
        for workload in workloads:
            for number in range(runs):
                _progress(f"{workload.title}, run {number + 1} of {runs}")
                turn = number % len(routers)
                _measure_once(workload, routers[turn:] + routers[:turn], instances, found)
    _progress("")


def _measure_once(workload: Workload, routers: Sequence[Router], instances: Fleet, found: Figures) -> None:
    """Measure one workload on each router, one right after the other."""
    alone = workload.clients == 1
    if alone:
        prefill, decode = uvloop.run(workload.direct(instances))
        _require_no_errors(workload, DIRECT, prefill.errors + decode.errors)
        found.add(workload.name, DIRECT, {"p50_ms": (prefill.p50 + decode.p50) * 1e3})
    for each in routers:
        plain = instances.counts()["plain"]
        sample, seen = uvloop.run(workload.measure(each))
        if each.name != ENVOY:
            seen.errors["not split"] += instances.counts()["plain"] - plain
        _require_no_errors(workload, each.name, seen.errors)
        if alone:
            direct = decode.p50 if each.name == ENVOY else prefill.p50 + decode.p50
            sample["added_p50_ms"] = sample["p50_ms"] - direct * 1e3
        found.add(workload.name, each.name, sample)


def _require_no_errors(workload: Workload, name: str, errors: Counter[str]) -> None:
    if +errors:
        listed = ", ".join(f"{count} {what}" for what, count in (+errors).items())
        raise Failed(f"{workload.title}: {name}: {listed}")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def machine() -> str:
    """Return what this machine is, in words."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(each.partition(": ")[2] for each in lines if each.startswith("model name"))
    memory = psutil.virtual_memory().total / (1 << 30)
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model}, {memory:.0f} GiB, {system}, Python {platform.python_version()}"
