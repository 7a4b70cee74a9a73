"""What to do where a port cannot be had."""

from __future__ import annotations

import errno


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
