"""The command itself: what it refuses before it runs, and what it writes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.replay import pool

pytestmark = pytest.mark.usefixtures("fake_fleet")


def call(*arguments: str | Path) -> Any:
    ended = CliRunner().invoke(
        app, ["replay", *map(str, arguments)], prog_name="vllm-pd-scheduler", env={"COLUMNS": "200"}
    )
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended


def fleet(trace: Path, strategies: str = "slow,fast") -> list[str]:
    return ["--trace", str(trace), "--strategies", strategies, "--prefill=3", "--decode=2", "--jobs=1"]


def test_it_compares(trace_file: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    ended = call(*fleet(trace_file, "slow, fast+late_binding"), "--json", out, "--plot", figure, "--rate=2")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "trace.jsonl: 11 requests at 2 times their rate (2.2 a second)" in ended.stdout
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [each["strategy"] for each in written["strategies"]] == ["slow", "fast+late_binding"]
    assert (written["rate"], written["strategies"][1]["ttft"]["mean"]) == (2.0, pytest.approx(2.2))
    assert written["strategies"][0]["find_rate"] is None
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_it_needs_no_fleet_to_help() -> None:
    assert "--find-rate" in call("--help").stdout


def test_limit_and_limits(trace_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--limit=6", "--ttft-slo=1", "--tpot-slo=0.1", "--seed=3", "--find-rate", "--json", out]
    assert call(*fleet(trace_file, "fast"), *arguments).exit_code == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["trace"]["requests"] == 6
    assert written["slo"] == {"ttft": 1.0, "tpot": 0.1, "target": 0.95}
    assert written["fleet"]["seed"] == 3
    assert written["strategies"][0]["attainment"] == 0.0  # 6 requests in 5 s: 1.2 s to the first token
    assert written["strategies"][0]["find_rate"]["rate"] == pytest.approx(1 / 1.2, rel=0.02)


def test_arrivals_are_spread(trace_file: Path, tmp_path: Path) -> None:
    seconds = []
    for spread in ("0s", "500ms"):
        out = tmp_path / f"{spread}.json"
        assert call(*fleet(trace_file, "fast"), "--spread", spread, "--json", out).exit_code == 0
        seconds.append(json.loads(out.read_text(encoding="utf-8"))["trace"]["seconds"])
    assert seconds[0] == 10
    assert seconds[1] != 10
    assert abs(seconds[1] - 10) < 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--spread", "a while"], "--spread: a while: write it as"),
        (["--strategies", "slow,fats"], "unknown strategy 'fats'; choose from slow, fast, hopeless, "),
        (["--strategies", "slow,"], "a name is missing beside a comma"),
        (["--strategies", ""], "name at least one"),
        (["--strategies", "slow,fast,slow"], "slow is named twice"),
        (["--setup", "toaster"], "Invalid value for --setup: unknown set-up 'toaster'"),
        (["--prefill", "0"], "--prefill"),
        (["--decode", "many"], "--decode"),
        (["--rate", "0"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--limit", "0"], "--limit"),
        (["--seed", "-1"], "--seed"),
        (["--ttft-slo", "0"], "--ttft-slo"),
        (["--ttft-slo", "nan"], "--ttft-slo"),
        (["--tpot-slo", "inf"], "inf is not a number that can be used"),
        (["--jobs", "0"], "--jobs"),
        (["--json", "nowhere/out.json"], "there is no directory nowhere"),
        (["--json", "."], "is a directory"),
        (["--plot", "out.txt"], "out.txt: the name must end in one of .png, .svg, .pdf"),
        (["--json", "out.png", "--plot", "out.png"], "that is where --json writes"),
    ],
)
def test_what_cannot_be_is_found_before_the_run(
    changed: list[str], message: str, trace_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trace_file.parent)
    monkeypatch.setattr(pool, "run_all", lambda *_: pytest.fail("it ran"))
    ended = call(*fleet(trace_file), *changed)
    assert ended.exit_code == 2
    assert message in ended.stderr


def test_the_trace_is_not_overwritten(trace_file: Path) -> None:
    before = trace_file.read_bytes()
    ended = call(*fleet(trace_file), "--json", trace_file)
    assert ended.exit_code == 2
    assert "that is the trace itself" in ended.stderr
    assert trace_file.read_bytes() == before


def test_a_trace_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,x,1\n")
    ended = call(*fleet(path))
    assert (ended.exit_code, ended.stdout) == (2, "")
    message = f"vllm-pd-scheduler: {path}: line 2: ContextTokens: 'x' is not a whole number\n"
    assert ended.stderr == message


def test_without_matplotlib_only_plot_is_refused(
    trace_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = call(*fleet(trace_file), "--plot", tmp_path / "out.png")
    assert ended.exit_code == 2
    assert "matplotlib is not installed" in ended.stderr
    assert "-m pip install" in ended.stderr
    assert call(*fleet(trace_file)).exit_code == 0


def test_what_the_fleet_refuses(trace_file: Path) -> None:
    ended = call(*fleet(trace_file, "odd"))
    assert ended.exit_code == 1
    assert ended.stderr == "vllm-pd-scheduler: odd: a prompt is longer than the engines' memory\n"


def test_a_disk_that_is_full(trace_file: Path) -> None:
    """The tables are not lost with the file."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    ended = call(*fleet(trace_file), "--json", full)
    assert ended.exit_code == 1
    assert "/dev/full: cannot be written: No space left on device" in ended.stderr
    assert "makespan" in ended.stdout


def test_a_load_is_generated_and_replayed(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"

    def generate(shape: str = "chat") -> Any:
        arguments = ["generate", shape, str(path), "--requests=60", "--seed=2"]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})

    assert generate().exit_code == 0
    first = path.read_bytes()
    assert len(first.splitlines()) >= 60
    ended = generate()
    assert (ended.exit_code, "exists: choose another name" in ended.stderr) == (2, True)
    path.unlink()
    assert "unknown shape 'odd'; there are chat, agents" in generate("odd").stderr
    generate()
    assert path.read_bytes() == first
    ended = call(*fleet(path, "fast"), "--realistic", "--leaves=2", "--seeds=3")
    assert "Over 3 seeds" in ended.stdout
    ended = call(*fleet(Path("made:code"), "fast"), "--limit=50")
    assert "made:code: " in ended.stdout


def test_leaves_need_links_that_are_shared(trace_file: Path) -> None:
    ended = call(*fleet(trace_file), "--leaves=2")
    assert ended.exit_code == 2
    assert "only with --realistic" in ended.stderr


@pytest.mark.parametrize(
    "option", ["--sync-delay=50ms", "--sync-loss=0.1", "--replica-dies=5s", "--replica-joins=5s"]
)
def test_what_schedulers_tell_needs_several(trace_file: Path, option: str) -> None:
    ended = call(*fleet(trace_file), option)
    assert ended.exit_code == 2
    assert "only with --replicas" in ended.stderr


@pytest.mark.parametrize("option", ["--replica-dies", "--replica-joins"])
@pytest.mark.parametrize("when", ["soon", "-1s", "nan", "1e9s"])
def test_when_one_dies_or_joins_is_a_time(trace_file: Path, option: str, when: str) -> None:
    ended = call(*fleet(trace_file), "--replicas=2", f"{option}={when}")
    assert ended.exit_code == 2
    assert f"{when}: write it as" in ended.stderr
