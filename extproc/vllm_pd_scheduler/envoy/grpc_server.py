"""The gRPC server that Envoy talks to: ext_proc, EDS, the access log and the health check at one address."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Sequence

import grpc

from ..models import join_address
from ..system.private_socket import is_served
from .limits import MAX_MESSAGE_BYTES

KEEPALIVE_INTERVAL_S = 5.0
"""Seconds of silence after which an Envoy is asked whether it is still there."""
KEEPALIVE_TIMEOUT_S = 8.0
"""Seconds that it has to answer. Then its connection is closed, and what its streams held is given back: the
streams of an Envoy whose machine lost power would stay until TCP gives up, which is hours."""

MAX_PATH_BYTES = 107
"""Length of a Unix socket's path, at most."""


class ListenError(Exception):
    """The server cannot listen; the message says where and why."""


def create_server(services: Sequence[grpc.GenericRpcHandler], max_body_bytes: int) -> grpc.aio.Server:
    """Return a server, not yet listening, of services whose largest message has a request's body in it."""
    interval, timeout = int(KEEPALIVE_INTERVAL_S * 1000), int(KEEPALIVE_TIMEOUT_S * 1000)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_body_bytes + MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", -1),  # all answers are ours
            ("grpc.so_reuseport", 0),
            ("grpc.http2.max_ping_strikes", 0),  # Envoy pings every second to find out if we hang
            ("grpc.keepalive_time_ms", interval),
            ("grpc.keepalive_timeout_ms", timeout),
            ("grpc.http2.ping_timeout_ms", timeout),  # without it a ping is waited for for a minute
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    )
    server.add_generic_rpc_handlers(tuple(services))
    return server


def listen(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None
) -> None:
    """Listen on a TCP port, in clear without credentials; raises :exc:`ListenError`."""
    address = join_address(host, port)
    try:
        _try_to_bind(host, port)
        if credentials is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, credentials)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror}") from None
    except RuntimeError:
        raise ListenError(f"cannot listen on {address}: is the port in use?") from None


def listen_on_socket(server: grpc.aio.Server, path: str) -> None:
    """Listen on a Unix socket that only this user can open; raises :exc:`ListenError`.

    One that a process left behind is replaced, one that somebody serves is not.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ListenError(f"cannot listen on {path}: a socket's path has at most {MAX_PATH_BYTES} bytes")
    before = os.umask(0o177)  # the socket is made with these permissions: there is no moment before a chmod
    try:
        _refuse_to_replace(path)
        server.add_insecure_port(f"unix:{path}")
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is its directory there, and writable?"
        raise ListenError(f"cannot listen on {path}: {reason}") from None
    finally:
        os.umask(before)


def _try_to_bind(host: str, port: int) -> None:
    """Raise the :exc:`OSError` that says why a port cannot be had; gRPC says it to stderr only.

    As with gRPC, one of a name's addresses is enough.
    """
    problem: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
                return
        except OSError as error:
            problem = error
    if problem is not None:
        raise problem


def _refuse_to_replace(path: str) -> None:
    """Raise :exc:`OSError` if what is at a path is no socket, or one that is served."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is something else")
        if is_served(path):
            raise FileExistsError(errno.EEXIST, "another process serves it")
    except FileNotFoundError:
        return
