"""The connections that this process has accepted, whoever in it holds them."""

from __future__ import annotations

import contextlib
import os
import socket
import stat


def close_accepted(address: int | str) -> int:
    """Shut down every connection that was accepted at an address; return how many. Any thread may call it.

    ``address`` is a TCP port or the path of a Unix socket. Whoever holds a connection finds it closed by the
    peer. Raises :exc:`OSError` where a process cannot list what it has open.
    """
    closed = 0
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # closed meanwhile, no connection
            copy = os.dup(int(name))  # so that it stays the same one while it is looked at
            stack.callback(os.close, copy)
            if stat.S_ISSOCK(os.fstat(copy).st_mode):
                connection = socket.socket(fileno=copy)
                stack.callback(connection.detach)
                closed += _shut(connection, address)
    return closed


def _shut(connection: socket.socket, address: int | str) -> bool:
    own = connection.getsockname()
    if address not in (own, own[1:2] and own[1]):
        return False
    connection.getpeername()  # raises for one that listens
    connection.shutdown(socket.SHUT_RDWR)
    return True
