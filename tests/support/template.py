"""Starts the project's processes as forks of one that has imported everything.

To import what a scheduler needs takes most of a second of CPU, and the suite starts hundreds. A fork is a
process of its own like any other: it has its session, signals, environment and exit code. Only ``exec`` is
missing, so the tests of the command line start theirs by :mod:`subprocess`. Other programs are started in the
same way, with ``exec``.

All of them end with the test process, also if that is killed. ``python -m tests.support.template`` is the one
that is forked. Each test process has one, which ends with it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, Any

from vllm_pd_scheduler.system.parent_death import die_with_parent

_MAINS = {
    "vllm_pd_scheduler": ("vllm_pd_scheduler.cli", "main"),
    "vllm_pd_scheduler.sim.server": ("vllm_pd_scheduler.sim.server", "main"),
}
"""The modules that are run by ``python -m``, and the function that each calls."""
_ENDS_AT_ONCE = {"vllm_pd_scheduler.sim.server"}
"""Those that end when their function has returned: Python would take apart first all that it has imported."""
_PRELOADED = ("vllm_pd_scheduler.service.app", "vllm_pd_scheduler.sim.worker")
_PR_SET_CHILD_SUBREAPER = 36
"""Option of ``prctl(2)``, from ``linux/prctl.h``."""
_MAX_REQUEST = 1 << 18


def start(command: list[str], output: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, with ``output`` as its stdout and stderr and no stdin.

    On Linux it is killed when this process ends.
    """
    if sys.platform == "linux":
        return _Forked(command, output, environment)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environment,
        start_new_session=True,
    )


class _Forked(subprocess.Popen[bytes]):
    """A process that the template makes in place of ``fork`` and ``exec``; all else is as usual."""

    def __init__(self, command: list[str], output: IO[bytes], environment: dict[str, str]) -> None:
        self._request = {
            "command": command,
            "environment": environment,
            "cwd": os.getcwd(),
            "parent": os.getpid(),
        }
        self._output = output.fileno()
        super().__init__(command)

    def _execute_child(self, *_: object, **__: object) -> None:
        self.pid = _template().fork(self._request, self._output)
        self._child_created = True


class _Template:
    def __init__(self) -> None:
        # The forks become children of this process when the one between them and the template ends.
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()

    def fork(self, request: dict[str, Any], output: int) -> int:
        """Return the id of a new process."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [output])
            return int(self._socket.recv(32))


@functools.cache
def _template() -> _Template:
    return _Template()


def _serve() -> None:
    """Fork for each request, until who asks has ended."""
    for module in (*(name for name, _ in _MAINS.values()), *_PRELOADED):
        importlib.import_module(module)
    asked = socket.socket(fileno=os.dup(0))
    while True:
        data, fds, _, _ = socket.recv_fds(asked, _MAX_REQUEST, 1)
        if not data:
            return
        told, tell = os.pipe()
        between = os.fork() or os.getpid()
        if os.getpid() == between:
            if pid := os.fork():
                os.write(tell, str(pid).encode())
                os._exit(0)
            _become(json.loads(data), fds[0], between)
        os.waitpid(between, 0)  # from now on it is a child of who asks
        asked.send(os.read(told, 32))
        for fd in (told, tell, *fds):
            os.close(fd)


def _become(request: dict[str, Any], output: int, between: int) -> None:
    """Be the process that is asked for, and end as it ends."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, wanted in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(fd, wanted)
    os.closerange(3, 256)
    while os.getppid() == between:
        time.sleep(0.001)
    # To the kernel the parent is the first thread of who asks, not the one that has asked.
    die_with_parent(request["parent"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    command: list[str] = request["command"]
    if command[:2] == [sys.executable, "-m"] and command[2] in _MAINS:
        status = _run(command[2:])
        if command[2] in _ENDS_AT_ONCE:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
        sys.exit(status)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what it execs would too
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)


def _run(arguments: list[str]) -> Any:
    """Run a module as ``python -m`` does; return its exit status."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[1:1] = [path for path in paths if path not in sys.path]
    sys.argv = arguments
    name, function = _MAINS[arguments[0]]
    return getattr(importlib.import_module(name), function)()


if __name__ == "__main__":
    _serve()
