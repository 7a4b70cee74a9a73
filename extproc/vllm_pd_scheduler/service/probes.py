"""The ports where it is asked how the scheduler is, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from ..admin.others import Others
from ..admin.probes_server import ProbesServer
from ..envoy.health import HealthService
from ..router import PDRouter
from ..rpc import ListenError, Server
from .listen_advice import listen_advice
from .parts import Parts
from .startup_error import StartupError


class Probes:
    """Those that are configured: one over HTTP, with ``/metrics``, and one over gRPC."""

    def __init__(self, router: PDRouter, health: HealthService, is_ready: Callable[[], bool]) -> None:
        self._router = router
        self._health = health
        self._is_ready = is_ready

    async def start(self, parts: Parts, others: Others | None = None) -> None:
        """Listen there; raise :exc:`.StartupError` if that cannot be."""
        config = self._router.config
        if config.metrics_port is not None:
            server = ProbesServer(self._router, self._is_ready, others)
            await parts.listen("metrics", server, config.metrics_host, config.metrics_port)
        if config.grpc_health_port is not None:
            await self._listen_for_grpc(parts, config.grpc_host, config.grpc_health_port)

    async def _listen_for_grpc(self, parts: Parts, host: str, port: int) -> None:
        server = Server(self._health.methods())
        try:
            await server.listen(host, port)
        except ListenError as error:
            advice = listen_advice("grpc_health", port, error.errno, "grpc_host")
            raise StartupError(f"grpc_health_port: {error}{advice}") from None
        parts.push_async_callback(server.stop)
