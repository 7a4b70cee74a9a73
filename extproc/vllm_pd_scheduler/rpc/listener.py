"""The sockets that a server listens on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat

from ..models import join_address
from ..system.private_socket import is_served

MAX_PATH_BYTES = 107
"""Length of a Unix socket's path, at most."""


class ListenError(Exception):
    """The server cannot listen; the message says where and why. ``errno`` is that of the system, if known."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


async def bind_port(host: str, port: int) -> list[socket.socket]:
    """Return a bound socket for each of a host's addresses; one that can be had is enough.

    Raises :exc:`ListenError`.
    """
    problem: OSError | None = None
    bound: list[socket.socket] = []
    try:
        addresses = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        addresses, problem = [], error
    for family, _, _, _, address in addresses:
        try:
            bound.append(_bound(family, address))
        except OSError as error:
            problem = error
    if not bound and problem is not None:
        message = f"cannot listen on {join_address(host, port)}: {problem.strerror}"
        raise ListenError(message, problem.errno) from None
    return bound


def _bound(family: int, address: object) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # "::" takes IPv4 too
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.bind(address)  # type: ignore[arg-type]  # as getaddrinfo gives it
    except OSError:
        made.close()
        raise
    return made


def bind_socket(path: str) -> tuple[socket.socket, int]:
    """Return a Unix socket at a path, which only this user can open, and its inode number.

    Raises :exc:`ListenError`.

    One that a process left behind is replaced, one that somebody serves is not.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ListenError(f"cannot listen on {path}: a socket's path has at most {MAX_PATH_BYTES} bytes")
    before = os.umask(0o177)  # the socket is made with these permissions: there is no moment before a chmod
    made = socket.socket(socket.AF_UNIX)
    try:
        _remove_left_behind(path)
        made.bind(path)
    except OSError as error:
        made.close()
        reason = error.strerror
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
            reason = f"{reason}: is its directory there, and writable?"
        raise ListenError(f"cannot listen on {path}: {reason}") from None
    finally:
        os.umask(before)
    return made, os.lstat(path).st_ino


def remove_socket(path: str, inode: int) -> None:
    """Remove the socket at a path, if it is still the one with this inode number."""
    with contextlib.suppress(OSError):
        if os.lstat(path).st_ino == inode:
            os.unlink(path)


def _remove_left_behind(path: str) -> None:
    """Raise :exc:`OSError` if what is at a path is no socket, or one that is served; else remove it."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is something else")
        if is_served(path):
            raise FileExistsError(errno.EEXIST, "another process serves it")
        os.unlink(path)
    except FileNotFoundError:
        return
