"""The real vLLM pair, which takes a minute to start: one for all tests, and one whose lease is short."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_vllm import Instance, Pair

_BESIDE = Path(__file__).parents[3] / "shared" / "vllm" / "run_pd_pair.sh"
SCRIPT = Path(os.environ.get("VLLM_PAIR_SCRIPT", _BESIDE))
ROOT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-pd-pair"

APIS = "--enable-auto-tool-choice --tool-call-parser hermes --enable-scale-out --enable-prompt-tokens-details"
"""What vLLM serves only when it is told to. With its mode for developers, its cache can be emptied."""


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
    _done(_run("up", AGG=1, P_EXTRA=APIS, D_EXTRA=APIS, VLLM_SERVER_DEV_MODE=1))
    yield Pair(Instance(28201, ROOT / "run/prefill.pid"), Instance(28202, ROOT / "run/decode.pid"))
    if not runs_already:
        _run("down", AGG=1)


@contextmanager
def _another_pair(name: str, ports: int, *, smoke_test: bool = True, **settings: object) -> Iterator[Pair]:
    """Another pair at ``ports`` and the next, of a smaller model; ``settings`` are the script's.

    Without ``smoke_test``, the script's own, which is NIXL's, is left out.
    """
    settings = {
        **{"ROOT": ROOT / name, "VENV": ROOT / "venv", "MODEL": ROOT / "tiny-llama"},
        **{"P_PORT": ports, "D_PORT": ports + 1},
        **settings,
    }
    try:
        for action in ("up",) if smoke_test else ("start", "wait"):
            _done(_run(action, **settings))
        run = ROOT / name / "run"
        yield Pair(Instance(ports, run / "prefill.pid"), Instance(ports + 1, run / "decode.pid"))
    finally:
        _run("down", **settings)


SMALL_CACHE = {"KV_BYTES": "4M", "MAXLEN": 2048, "MAXSEQS": 2}


@pytest.fixture(scope="module")
def short_lease(pair: Pair) -> Iterator[Pair]:
    """Another pair, whose P keeps a hand-off for 3 s, in a cache so small that it is soon overwritten.

    Its D takes two requests at a time, and prefills itself when a hand-off does not come.
    """
    ports = {"P_SIDE": 5610, "P_EV": 5657, "D_SIDE": 5710, "D_EV": 5667}
    lease = {"LEASE": 3, "LOAD_FAIL": "recompute"}
    with _another_pair("short-lease", 28211, **ports, **lease, **SMALL_CACHE) as found:
        yield found


def _publishing(port: int) -> str:
    """Return the options that have vLLM publish at a port, where it listens because of the asterisk."""
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": f"tcp://*:{port + 1}",
    }
    return _json_option("--kv-events-config", config)


def _json_option(name: str, value: dict[str, Any]) -> str:
    return f"{name} {json.dumps(value, separators=(',', ':'))}"


@pytest.fixture(scope="module")
def publishing(pair: Pair) -> Iterator[Pair]:
    """Another pair that publishes KV events, at 5677 and 5687, of caches that are soon full."""
    ports = {"P_SIDE": 5620, "D_SIDE": 5720}
    extra = {"P_EXTRA": _publishing(5677), "D_EXTRA": _publishing(5687)}
    with _another_pair("publishing", 28221, **ports, **extra, **SMALL_CACHE) as found:
        yield found


def _transfer(connector: str, role: str, **extra: object) -> str:
    """Return the options of an instance that has another connector than the script's."""
    more = {"kv_connector": connector, "kv_role": role, "kv_connector_extra_config": extra}
    return f"{APIS} {_json_option('--kv-transfer-config', {**more, 'kv_buffer_device': 'cpu'})}"


@contextmanager
def _pair_of(connector: str, name: str, ports: int, **extra: object) -> Iterator[Pair]:
    """Another pair whose P and D have another connector than the script's."""
    settings = {
        **{"P_SIDE": ports + 2, "D_SIDE": ports + 3},
        "P_EXTRA": _transfer(connector, "kv_producer", **extra),
        "D_EXTRA": _transfer(connector, "kv_consumer", **extra),
    }
    with _another_pair(name, ports, smoke_test=False, **settings) as found:
        yield found


@pytest.fixture(scope="module")
def push_pair(pair: Pair) -> Iterator[Pair]:
    """A pair whose P pushes."""
    with _pair_of("NixlPushConnector", "push", 28221) as found:
        yield found


@pytest.fixture(scope="module")
def store_pair(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A pair with a folder between them."""
    path = str(tmp_path_factory.mktemp("store"))
    with _pair_of("ExampleConnector", "store", 28231, shared_storage_path=path) as found:
        yield found
