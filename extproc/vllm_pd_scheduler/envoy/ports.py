"""The ports of an Envoy beside the scheduler.

Imports little: the command line, which reads the defaults, starts fast.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from ..models import join_address

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
