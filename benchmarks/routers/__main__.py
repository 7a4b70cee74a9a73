"""The command line: ``python -m benchmarks.routers``, in the clone."""

import argparse
import os
import signal
import sys
from pathlib import Path

from vllm_pd_scheduler.envoy.process import EnvoyError

from . import figures, report
from .routers import OURS, PEER, ROUTERS, StartError, peer_command
from .run import Failed, measure
from .workloads import KINDS, WORKLOADS

RUNS = 5
FAILED, DEARER = 1, 3
"""Exit codes: something failed; a cost has grown beyond the tolerance. 2 is a wrong argument."""


def main() -> int:
    """Measure, print and compare; return the exit code."""
    options = _options()
    names = [name for name in ROUTERS if name != PEER or peer_command()]
    if PEER not in names:
        print(
            f"{PEER} is left out: it is not installed. `{sys.executable} -m pip install --editable "
            "'.[bench]'` in the clone installs it.",
            file=sys.stderr,
        )
        if options.save:
            return FAILED  # the documentation shows it
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 0.75 * cores:
        print(
            f"the machine is busy (load {load:.1f}, {cores} cores): do not trust the figures", file=sys.stderr
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the routers, too
    try:
        found = measure([each for each in WORKLOADS if each.kind in options.only], names, options.runs)
    except (Failed, StartError, EnvoyError) as error:
        print(error, file=sys.stderr)
        return FAILED
    print(f"{found.machine}; median (range) of {options.runs} interleaved runs\n\n{report.table(found)}\n")
    if options.json:
        found.save(options.json)
    if options.save:
        found.save(figures.LAST_RELEASE)
        return 0
    return _compare(found)


def _compare(found: figures.Figures) -> int:
    if not figures.LAST_RELEASE.exists():
        return 0
    last = figures.load(figures.LAST_RELEASE)
    changes = list(figures.changes(last, found))
    print(report.comparison(changes, f"version {last.versions[OURS]}, {last.taken}"))
    return DEARER if any(each.is_dearer for each in changes) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routers",
        description="Measure what a request costs, beside vllm-router and bare Envoy, and compare with the "
        "last release. docs/performance.md says how to read it.",
        epilog=f"Exit codes: {FAILED}: a request or a start failed. {DEARER}: a cost has grown by more than "
        f"{figures.TOLERANCE:.0%}.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"kinds of workload, of {', '.join(KINDS)}; all by default",
    )
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each workload; {RUNS} by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument(
        "--save", action="store_true", help=f"make them the last release's: {figures.LAST_RELEASE.name}"
    )
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if options.save and set(options.only) != set(KINDS):
        parser.error("--save needs all workloads")
    return options


if __name__ == "__main__":
    sys.exit(main())
