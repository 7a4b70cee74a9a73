"""Each benchmark still runs: in a small form, with a program that has changed since it was written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.shifting_load import Phase

from benchmarks import shifting_load
from vllm_pd_scheduler.replay.fleet import FleetSpec

ROOT = Path(__file__).parents[2]
FILES = sorted(file.stem for file in (ROOT / "benchmarks").glob("test_*.py"))
LIMIT_S = 300.0
"""What takes longer hangs: on a busy machine all together take a minute."""
AT_ONCE = ("--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0", "--benchmark-min-time=0")

SIZES = {
    "BODY_MIB": "1",
    "EXCHANGES": "10",
    "HOLDERS": "20",
    "INSTANCES": "4",
    "REQUESTS": "16",
    "ROUNDS": "2",
    "SECONDS_A_TURN": "0.1",
    "TOKENS": "2",
    "TURNS": "1",
}
"""What the benchmarks say that they can be given."""
SOME = (
    "not 250 and not 1000 and not 4-engines and not grpc.aio"
    " and (not test_body or split-image) and (not test_connector or nixl-push)"
)
"""Which are enough: the others do the same with more."""
COMMANDS = {
    "choices": "--loads=chat --models=llama --fleets=1 --strategies=least_load --seeds=1",
    "kubernetes": "outage --rate=20 --seconds=0.1",
    "workers": "--workers=1 --instances=1 --clients=2 --seconds=0.1 --runs=1",
}


def run(arguments: list[str], directory: Path) -> str:
    """Run a Python with arguments to its end; return what it printed."""
    paths = os.pathsep.join((str(ROOT), *filter(None, sys.path)))
    # With several workers at the tests, pytest-benchmark would measure nothing in what they start.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    log = directory / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=directory,
            env={**inherited, **SIZES, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it has started ends with it
        )
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    printed = log.read_text()
    if code is None:
        pytest.fail(f"{' '.join(arguments)} hangs: not at its end after {LIMIT_S:g} s; it printed\n{printed}")
    assert code == 0, f"{' '.join(arguments)} ended with {code}; it printed\n{printed}"
    return printed


def test_benchmarks(tmp_path: Path) -> None:
    ours = ("-p", "no:xdist", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--capture=no", "-v")
    printed = run(["-m", "pytest", *ours, *AT_ONCE, "-k", SOME, str(ROOT / "benchmarks")], tmp_path)
    assert " skipped" not in printed
    assert [name for name in FILES if f"{name}.py::" not in printed] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, tmp_path: Path) -> None:
    assert run(["-m", f"benchmarks.{name}", *COMMANDS[name].split()], tmp_path)


def test_shifting_load(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phase(90.0, 2.0, 1000.0, 50.0), Phase(60.0, 2.0, 100.0, 200.0)
    found = shifting_load.compare(phases, FleetSpec(1, 1))
    for plan, results in zip(shifting_load.plans(), found, strict=True):
        shifting_load.show(plan.name, results)
    said = capsys.readouterr().out
    assert all(said.count(plan.name) == 2 for plan in shifting_load.plans())
