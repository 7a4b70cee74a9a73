"""The ports of an Envoy beside the scheduler.

Imports nothing of ours: the command line, which reads the defaults, starts fast.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFILL_PORT = 10001
"""The port of ``envoy.yaml``'s prefill listener."""


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
