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


def _publishing(port: int) -> str:
    """Return the options that have vLLM publish at a port, where it listens because of the asterisk."""
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": f"tcp://*:{port + 1}",
    }
    return f"--kv-events-config {json.dumps(config, separators=(',', ':'))}"


@pytest.fixture(scope="module")
def publishing(pair: Pair) -> Iterator[Pair]:
    """Another pair that publishes KV events, at 5677 and 5687, of caches that are soon full."""
    settings: dict[str, object] = {
        "ROOT": ROOT / "publishing",
        "VENV": ROOT / "venv",
        "MODEL": ROOT / "tiny-llama",
        **{"P_PORT": 28221, "P_SIDE": 5620, "D_PORT": 28222, "D_SIDE": 5720},
        **{"P_EXTRA": _publishing(5677), "D_EXTRA": _publishing(5687)},
        **{"KV_BYTES": "4M", "MAXLEN": 2048, "MAXSEQS": 2},
    }
    try:
        _done(_run("up", **settings))
        run = ROOT / "publishing" / "run"
        yield Pair(Instance(28221, run / "prefill.pid"), Instance(28222, run / "decode.pid"))
    finally:
        _run("down", **settings)


@contextmanager
def _another_pair(name: str, ports: int, prefill: dict[str, Any], decode: dict[str, Any]) -> Iterator[Pair]:
    """A pair with other connectors than the script's: its smoke test, which is NIXL's, is left out."""
    extra = [
        f"{APIS} --kv-transfer-config {json.dumps(each, separators=(',', ':'))}" for each in (prefill, decode)
    ]
    settings: dict[str, object] = {
        **{"ROOT": ROOT / name, "VENV": ROOT / "venv", "MODEL": ROOT / "tiny-llama"},
        **{"P_PORT": ports, "D_PORT": ports + 1, "P_SIDE": ports + 2, "D_SIDE": ports + 3},
        **{"P_EXTRA": extra[0], "D_EXTRA": extra[1]},
    }
    try:
        _done(_run("start", **settings))
        _done(_run("wait", **settings))
        run = ROOT / name / "run"
        yield Pair(Instance(ports, run / "prefill.pid"), Instance(ports + 1, run / "decode.pid"))
    finally:
        _run("down", **settings)


def _config(connector: str, role: str, **extra: object) -> dict[str, Any]:
    more = {"kv_connector": connector, "kv_role": role, "kv_connector_extra_config": extra}
    return {**more, "kv_buffer_device": "cpu"}


@pytest.fixture(scope="module")
def push_pair(pair: Pair) -> Iterator[Pair]:
    """A pair whose P pushes."""
    roles = (_config("NixlPushConnector", role) for role in ("kv_producer", "kv_consumer"))
    with _another_pair("push", 28221, *roles) as found:
        yield found


@pytest.fixture(scope="module")
def store_pair(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A pair with a folder between them."""
    path = str(tmp_path_factory.mktemp("store"))
    roles = (
        _config("ExampleConnector", role, shared_storage_path=path) for role in ("kv_producer", "kv_consumer")
    )
    with _another_pair("store", 28231, *roles) as found:
        yield found
