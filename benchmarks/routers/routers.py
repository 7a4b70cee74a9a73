"""How each router is started before a fleet of fake engines, and ended."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support.processes import unused_ports

from vllm_pd_scheduler.envoy.process import find_envoy

from . import cpu, fake_engine

START_S = 60.0
END_S = 10.0

OURS, PEER, ENVOY = "scheduler", "vllm-router", "envoy"
"""The scheduler with its Envoy; the peer; and Envoy alone, which sends requests to D without a hand-off."""
ROUTERS = (OURS, PEER, ENVOY)

_REQUEST = b'{"model": "fake-model", "prompt": "Hello", "max_tokens": 1}'
_ROOT = Path(__file__).parents[2]


class StartError(Exception):
    """A process does not start; the message has the end of what it printed."""


@dataclass(frozen=True)
class Fleet:
    """The ports of the fake instances."""

    prefill: list[int]
    decode: list[int]

    def counts(self) -> dict[str, int]:
        """Return what D has counted: requests with a hand-off, and plain ones."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.decode[0]}/counts", timeout=5) as response:
            return dict(json.load(response))


@dataclass(frozen=True)
class Router:
    """A router that runs: where clients reach it, and its process."""

    name: str
    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """Return what it has used, all its processes together."""
        return cpu.cpu_seconds(self.pid)

    def resident_mb(self) -> float:
        """Return its memory, all its processes together."""
        return cpu.resident_mb(self.pid)


def peer_command() -> str | None:
    """Return the path of vllm-router's command: beside this Python, else on ``PATH``."""
    beside = Path(sys.executable).parent / "vllm-router"
    return str(beside) if beside.exists() else shutil.which("vllm-router")


def versions() -> dict[str, str]:
    """Return the version of each router that is installed."""
    found = {OURS: metadata.version("vllm-pd-scheduler")}
    command = peer_command()
    if command:
        its_python = Path(command).read_text(encoding="utf-8").splitlines()[0].removeprefix("#!")
        script = "from importlib.metadata import version; print(version('vllm-router'))"
        found[PEER] = _output(its_python, "-c", script)
    printed = re.search(r"version: \w+/([^/]+)/", _output(find_envoy(), "--version"))
    found[ENVOY] = printed[1] if printed else "?"
    return found


@contextlib.contextmanager
def fleet(size: int, folder: Path) -> Iterator[Fleet]:
    """Run so many prefill and so many decode instances, in a process for each role."""
    ports = unused_ports(2 * size)
    found = Fleet(ports[:size], ports[size:])
    with contextlib.ExitStack() as running:
        for role, those in (("prefill", found.prefill), ("decode", found.decode)):
            command = [sys.executable, "-m", fake_engine.__name__, *map(str, those)]
            log = folder / f"{role}.log"
            _until(partial(_answers, those[0], "/health"), running.enter_context(_process(command, log)), log)
        yield found


@contextlib.contextmanager
def router(name: str, strategy: str, instances: Fleet, folder: Path) -> Iterator[Router]:
    """Run a router before a fleet; the block begins when it answers requests with a hand-off."""
    port, command = _COMMANDS[name](strategy, instances, folder)
    log = folder / f"{name}.log"
    with _process(command, log) as process:

        def ready() -> bool:
            before = instances.counts()["hand_offs"]
            done = _answers(port, "/v1/completions", _REQUEST)
            return done and (name == ENVOY or instances.counts()["hand_offs"] > before)

        _until(ready, process, log)
        yield Router(name, port, process.pid)


def _ours(strategy: str, instances: Fleet, folder: Path) -> tuple[int, list[str]]:
    port, prefill_port, admin_port, envoy_admin_port = unused_ports(4)
    config: dict[str, Any] = {"strategy": strategy}
    for role in ("prefill", "decode"):
        config[f"{role}_instances"] = [
            {"id": f"{role}-{number}", "host": "127.0.0.1", "port": each}
            for number, each in enumerate(getattr(instances, role))
        ]
    command = [sys.executable, "-m", "vllm_pd_scheduler", "up", "--log-level", "WARNING"]
    command += ["--config", _written(folder / "scheduler.json", config), "--port", str(port)]
    command += ["--prefill-port", str(prefill_port), "--admin-port", str(admin_port)]
    return port, [*command, "--envoy-admin-port", str(envoy_admin_port)]


def _peer(strategy: str, instances: Fleet, folder: Path) -> tuple[int, list[str]]:
    port, metrics_port = unused_ports(2)
    command = [peer_command() or "vllm-router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--vllm-pd-disaggregation", "--policy", strategy, "--log-level", "warning"]
    for role in ("prefill", "decode"):
        for each in getattr(instances, role):
            command += [f"--{role}", f"http://127.0.0.1:{each}"]
    return port, [*command, "--prometheus-port", str(metrics_port)]


def _envoy(strategy: str, instances: Fleet, folder: Path) -> tuple[int, list[str]]:
    """The least that an Envoy can do: one route to all decode instances, with as many workers as ours has."""
    (port,) = unused_ports(1)
    kinds = "type.googleapis.com/envoy.extensions.filters"
    to_router = {"@type": f"{kinds}.http.router.v3.Router"}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "decode", "timeout": "0s"}}
    manager = {
        "@type": f"{kinds}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": to_router}],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    endpoints = [{"endpoint": {"address": _address(each)}} for each in instances.decode]
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 1_000_000)
    cluster = {
        "name": "decode",
        "lb_policy": strategy.upper(),
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {"cluster_name": "decode", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    listener = {"name": "ingress", "address": _address(port), "filter_chains": [{"filters": filters}]}
    config = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    command = [find_envoy(), "-c", _written(folder / "envoy.json", config), "--disable-hot-restart"]
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    return port, [*command, "--concurrency", str(workers), "--log-level", "warning"]


_COMMANDS: dict[str, Callable[[str, Fleet, Path], tuple[int, list[str]]]] = {
    OURS: _ours,
    PEER: _peer,
    ENVOY: _envoy,
}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _written(path: Path, config: dict[str, Any]) -> str:
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the clone's folder; at the end of the block it and its descendants are ended."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=_ROOT, start_new_session=True
        )
    try:
        yield process
    finally:
        cpu.end(process.pid, END_S)
        process.wait()


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            printed = log.read_text(errors="replace")[-2000:]
            raise StartError(f"{process.args!r} does not serve requests. It printed:\n{printed}")
        time.sleep(0.05)


def _answers(port: int, path: str, body: bytes | None = None) -> bool:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except OSError:  # also an answer with an error's status
        return False


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
