"""What to do where a port cannot be had."""

from __future__ import annotations

import errno
import os
import socket

from ..models import join_address
from .startup_error import StartupError


def cannot_listen(server: str, host: str, port: int, error: OSError) -> StartupError:
    """Return what says that a server, ``admin`` say, cannot listen at its port, and why."""
    # Not error.strerror of a server that asyncio could not start: it has the address once more.
    why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    advice = listen_advice(server, port, error.errno)
    return StartupError(f"{server}_port: cannot listen on {join_address(host, port)}: {why}{advice}")


def listen_advice(server: str, port: int, number: int | None, host: str | None = None) -> str:
    """Return what follows a message that a server, ``admin`` or ``grpc``, cannot listen at ``port``.

    ``number`` is the system's error number, ``host`` the key of its address if it has another name.
    """
    if number == errno.EADDRINUSE:
        shown = f"`ss -ltnp 'sport = :{port}'` shows which process has it"
        return f". {shown}: end that, or choose another {server}_port"
    if number == errno.EADDRNOTAVAIL:
        key = host or f"{server}_host"
        return f": no network interface of this machine has that address; choose another {key}"
    if number == errno.EACCES:
        return f": a port below 1024 needs a privilege; choose a higher {server}_port"
    return ""
