"""The real vLLM pair, which takes a minute to start: one for all tests, and one whose lease is short."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_vllm import Instance, Pair

_BESIDE = Path(__file__).parents[3] / "shared" / "vllm" / "run_pd_pair.sh"
SCRIPT = Path(os.environ.get("VLLM_PAIR_SCRIPT", _BESIDE))
ROOT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-pd-pair"


def _run(action: str, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    return subprocess.run([SCRIPT, action], env=environment, capture_output=True, text=True, timeout=1500)


def _done(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Prefill, decode and aggregated instances, unless they run already; what was started is ended."""
    if not SCRIPT.exists():
        pytest.skip(
            f"{SCRIPT} is not there (VLLM_PAIR_SCRIPT): it installs and starts a vLLM pair on this CPU"
        )
    runs_already = "pid" in _run("status").stdout
    _done(_run("up", AGG=1))
    yield Pair(Instance(28201, ROOT / "run/prefill.pid"), Instance(28202, ROOT / "run/decode.pid"))
    if not runs_already:
        _run("down", AGG=1)


@pytest.fixture(scope="module")
def short_lease(pair: Pair) -> Iterator[Pair]:
    """Another pair, whose P keeps a hand-off for 3 s, in a cache so small that it is soon overwritten.

    Its D takes two requests at a time, and prefills itself when a hand-off does not come.
    """
    settings: dict[str, object] = {
        "ROOT": ROOT / "short-lease",
        "VENV": ROOT / "venv",
        "MODEL": ROOT / "tiny-llama",
        **{"P_PORT": 28211, "P_SIDE": 5610, "P_EV": 5657, "D_PORT": 28212, "D_SIDE": 5710, "D_EV": 5667},
        **{"LEASE": 3, "LOAD_FAIL": "recompute", "KV_BYTES": "4M", "MAXLEN": 2048, "MAXSEQS": 2},
    }
    try:
        _done(_run("up", **settings))
        run = ROOT / "short-lease" / "run"
        yield Pair(Instance(28211, run / "prefill.pid"), Instance(28212, run / "decode.pid"))
    finally:
        _run("down", **settings)
