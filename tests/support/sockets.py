"""The sockets of another process, as it has them: what options its connections really have."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def sockets_of(pid: int) -> Iterator[list[socket.socket]]:
    """Copies of a process's sockets, closed at the end of the block.

    Skips the test where this process may not have them (another user's, or ``kernel.yama.ptrace_scope``).
    """
    with contextlib.ExitStack() as stack:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        found = []
        for number in [int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()]:
            copy = _libc.syscall(_PIDFD_GETFD, process, number, 0)
            if copy >= 0 and stat.S_ISSOCK(os.fstat(copy).st_mode):
                found.append(stack.enter_context(socket.socket(fileno=copy)))
            elif copy >= 0:
                os.close(copy)
            elif ctypes.get_errno() in (1, 38):  # EPERM, ENOSYS
                pytest.skip(
                    f"the sockets of another process cannot be seen: {os.strerror(ctypes.get_errno())}"
                )
        yield found


def peer_of(connection: socket.socket) -> object | None:
    """The address at the other end, ``None`` for a socket that is not connected."""
    with contextlib.suppress(OSError):
        return connection.getpeername()
    return None


def gives_up_after(connection: socket.socket) -> tuple[float, float]:
    """Seconds after which a connection to a peer that vanished ends: while it is silent, and while it sends.

    Infinite without keepalive; 0 for the second means the system's default.
    """
    options = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    limit, idle, interval, probes = (connection.getsockopt(socket.IPPROTO_TCP, each) for each in options)
    if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return math.inf, limit / 1000
    if limit:  # then the kernel counts no probes, and ends the connection at the first one after it
        probes = math.ceil((limit / 1000 - idle) / interval)
    return idle + probes * interval, limit / 1000
