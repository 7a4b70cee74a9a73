"""The gRPC server that Envoy asks, and a watch on the event loop that answers it."""

from __future__ import annotations

import logging

from ..config import is_loopback
from ..envoy.access_log import AccessLog
from ..envoy.eds import EndpointDiscovery
from ..envoy.ext_proc import ExtProcService
from ..envoy.health import HealthService
from ..envoy.retries import RetryCheck
from ..router import PDRouter
from ..rpc import ListenError, Server
from .certificates import followed
from .listen_advice import listen_advice
from .parts import Parts
from .startup_error import StartupError
from .watchdog import LoopWatchdog

log = logging.getLogger(__name__)


async def listen_for_envoy(
    router: PDRouter, ext_proc: ExtProcService, health: HealthService, parts: Parts
) -> None:
    """Take Envoy's calls from now on; raise :exc:`.StartupError` if its port cannot be had."""
    config, in_flight = router.config, router.in_flight
    access_log = AccessLog(in_flight.attempt_failed, in_flight.told, in_flight.is_for_us)
    retries = RetryCheck(in_flight.may_try_again, router.again, in_flight.in_vain, config.max_body_bytes)
    discovery = EndpointDiscovery(router.registry, router.membership.knows)
    services = (ext_proc, discovery, access_log, retries, health)
    server = Server({path: method for each in services for path, method in each.methods().items()})
    await _listen(server, router, parts)
    parts.push_async_callback(server.stop)
    telemetry = router.telemetry
    watchdog = LoopWatchdog(telemetry.process.event_loop_stalled, telemetry.process.event_loop_late)
    watchdog.start()
    parts.callback(watchdog.stop)


async def _listen(server: Server, router: PDRouter, parts: Parts) -> None:
    config = router.config
    if config.grpc_socket is not None:
        try:
            await server.listen_on_socket(config.grpc_socket)
        except ListenError as error:
            raise StartupError(f"grpc_socket: {error}") from None
        return
    tls = followed("grpc_tls", config.grpc_tls, router.events, parts)
    try:
        await server.listen(config.grpc_host, config.grpc_port, tls)
    except ListenError as error:
        advice = listen_advice("grpc", config.grpc_port, error.errno)
        raise StartupError(f"grpc_port: {error}{advice}") from None
    if not config.grpc_tls and not is_loopback(config.grpc_host):
        log.warning(
            "grpc_host %s can be reached from other machines and grpc_tls is not set: whoever reaches "
            "port %d can have the instances' addresses and API keys, and prompts pass in clear",
            config.grpc_host,
            config.grpc_port,
        )
