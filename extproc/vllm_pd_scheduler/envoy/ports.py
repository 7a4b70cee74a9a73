"""The ports of an Envoy beside the scheduler.

Imports nothing of ours: the command line, which reads the defaults, starts fast.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFILL_PORT = 10001
"""The port of ``envoy.yaml``'s prefill listener."""

CONTINUATION_PORT = 9004
"""The port of ``envoy.yaml``'s cluster ``continuation``."""


@dataclass(frozen=True, slots=True)
class EnvoyPorts:
    """The ports of Envoy, and that of the scheduler's gRPC; the defaults are those of ``envoy/envoy.yaml``.

    The ingress listener binds to the IP address ``address``; ``::`` takes IPv4 too. ``grpc_socket``, the path
    of a Unix socket, replaces ``grpc``. Without ``prefill`` there is no prefill listener, and without
    ``continuation``, a port of the scheduler's, no way for streams that another D shall go on with; where
    it is known how many listen there and at the ports that follow (``continues``: each worker does), Envoy
    looks whether they hang.
    """

    ingress: int = 10000
    prefill: int | None = PREFILL_PORT
    admin: int = 9901
    grpc: int = 9002
    address: str | None = None
    grpc_socket: str | None = None
    continuation: int | None = CONTINUATION_PORT
    continues: int = 0

    @property
    def ingress_address(self) -> str:
        """The IP address at which this machine reaches the ingress listener."""
        return "127.0.0.1" if self.address in (None, "0.0.0.0", "::") else self.address

    def listeners(self) -> list[tuple[str, str, int]]:
        """Return the option, host and port of each of Envoy's listeners."""
        listeners = [
            ("--port", self.address or "0.0.0.0", self.ingress),
            ("--envoy-admin-port", "127.0.0.1", self.admin),
        ]
        if self.prefill is not None:
            listeners.insert(1, ("--prefill-port", "127.0.0.1", self.prefill))
        return listeners
