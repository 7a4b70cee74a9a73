"""A real Valkey or Redis server at an unused port, that can be killed, stopped and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import unused_ports
from tests.support.template import start

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")

needs_server = pytest.mark.skipif(
    SERVER is None, reason="neither valkey-server nor redis-server is installed (Debian: redis-server)"
)


class Server:
    """One server, with a directory of its own. It keeps nothing on the disk."""

    def __init__(self, directory: Path, *options: str, sentinel: bool = False) -> None:
        self.port = unused_ports(1)[0]
        self._directory = directory
        self._options = (*options, 'save ""')
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and return when it accepts connections."""
        self._directory.mkdir(parents=True, exist_ok=True)
        config = self._directory / "server.conf"
        if not self._sentinel or not config.exists():  # a Sentinel writes its own
            own = self._options[:-1] if self._sentinel else self._options
            lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self._directory}", *own]
            config.write_text("\n".join(lines) + "\n")
        assert SERVER is not None
        with (self._directory / "log").open("ab") as log:
            command = [SERVER, str(config), *(["--sentinel"] if self._sentinel else [])]
            self._process = start(command, log, dict(os.environ))
        try:
            until_listening(self.port, self._process)
        except TimeoutError:
            raise AssertionError((self._directory / "log").read_text()) from None

    def ask(self, *words: str, password: str | None = None) -> str:
        """Return the raw answer to a command."""
        return ask(self.port, *words, password=password)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as ``kill -9``; nothing is saved."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def ask(port: int, *words: str, password: str | None = None) -> str:
    """Return a server's raw answer to a command."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as made:
        if password is not None:
            made.sendall(_packed("AUTH", password))
            made.recv(1 << 16)
        made.sendall(_packed(*words))
        return made.recv(1 << 16).decode(errors="replace")


def until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server accepts connections; raise :exc:`TimeoutError` if it has ended, or does not."""
    until = time.monotonic() + 60
    while True:
        try:
            assert ask(port, "PING")  # a connection alone may be reset while it starts
        except (OSError, AssertionError):
            if process.poll() is not None or time.monotonic() > until:
                raise TimeoutError from None
            time.sleep(0.02)
        else:
            return


def _packed(*words: str) -> bytes:
    parts = (f"${len(each.encode())}\r\n{each}\r\n" for each in words)
    return f"*{len(words)}\r\n{''.join(parts)}".encode()


@contextmanager
def running(directory: Path, *options: str, sentinel: bool = False) -> Iterator[Server]:
    """Run a server with lines of its configuration file."""
    server = Server(directory, *options, sentinel=sentinel)
    try:
        server.start()
        yield server
    finally:
        server.kill()
