"""Runs the scheduler until a signal comes: alone (``serve``) or with an Envoy of its own (``up``)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from ..config import SchedulerConfig
from ..config.listeners import clashes, listeners_of
from ..envoy.configuration import render_config
from ..envoy.ports import EnvoyPorts
from ..envoy.process import EnvoyProcess, require_free
from ..models import join_address
from ..sync.local import leave_together, tell_alive, tell_ready
from ..system.output import StandardStreams
from ..system.private_socket import private_socket_path
from .app import App
from .reload import ConfigFile
from .signals import Signals, until_asked
from .startup_error import StartupError
from .worker import Worker

log = logging.getLogger(__name__)

Started = Callable[[], Awaitable[None]]
"""Called when requests can come."""


async def serve(
    config: SchedulerConfig,
    streams: StandardStreams,
    file: ConfigFile | None = None,
    worker: Worker | None = None,
) -> int:
    """Serve until a signal comes, drain, and return the exit status. ``file`` can be read again.

    ``worker`` is which of several workers this is; their parent is told when it serves.

    Raise :exc:`~vllm_pd_scheduler.service.startup_error.StartupError`.
    """
    app = App(config, streams, file, worker)
    signals = Signals(app.hang_up if file else None)
    async with app, contextlib.AsyncExitStack() as stack:
        if worker is not None:
            await tell_ready(worker.hub, worker.name)
            alive = asyncio.ensure_future(tell_alive(worker.hub, worker.name))
            stack.callback(alive.cancel)
        await signals.wait()
        app.say_draining()
        await signals.run_drain(app.drain() if worker is None else _drain_together(app, worker))
    return 0


async def _drain_together(app: App, worker: Worker) -> None:
    """Drain, and leave when the other workers do: as long as one of them has a request, Envoy asks all."""
    until = asyncio.get_running_loop().time() + app.config.drain_timeout
    await app.drain()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            await leave_together(worker.hub, worker.name)
            await app.drain()  # of what has come meanwhile


async def up(
    config: SchedulerConfig,
    ports: EnvoyPorts,
    log_level: str,
    started: Started,
    streams: StandardStreams,
    *,
    access_log: bool = True,
    file: ConfigFile | None = None,
) -> int:
    """Serve with an Envoy of our own until a signal comes, drain, and return the exit status.

    The status is 1 if Envoy ends first. Envoy's output goes through ``streams``, its access log only if
    ``access_log`` is true. ``file`` can be read again. The two speak over a socket that only this user can
    open, unless the configuration names another socket, or a port.

    Raise :exc:`~vllm_pd_scheduler.service.startup_error.StartupError` or
    :exc:`~vllm_pd_scheduler.envoy.process.EnvoyError`.
    """
    if config.grpc_tls:
        raise StartupError("grpc_tls: Envoy beside the scheduler is reached in clear: use serve, not up")
    require_free(ports)
    with contextlib.ExitStack() as stack:
        if config.grpc_socket is None and not config.model_fields_set & {"grpc_host", "grpc_port"}:
            try:
                path = stack.enter_context(private_socket_path())
            except OSError as error:
                raise StartupError(
                    f"grpc_socket: no directory can be made for one ({error.strerror}): set TMPDIR to where "
                    "one can, or give --grpc-port"
                ) from None
            config = config.model_copy(update={"grpc_socket": path})
        port = config.continuation_port
        ports = replace(ports, grpc_socket=config.grpc_socket, continuation=port, continues=1)
        ingress = f"http://{join_address(ports.ingress_address, ports.ingress)}"
        config = config.model_copy(update={"continuation_ingress": ingress})
        _require_distinct(config, ports)
        return await _up(config, ports, log_level, started, streams, access_log, file)


async def _up(
    config: SchedulerConfig,
    ports: EnvoyPorts,
    log_level: str,
    started: Started,
    streams: StandardStreams,
    access_log: bool,
    file: ConfigFile | None,
) -> int:
    app = App(config, streams, file)
    signals = Signals(app.hang_up if file else None)
    rendered = render_config(
        ports, config.instance_tls, config.stream_idle_timeout, config.max_retries, config.public_paths
    )
    process = EnvoyProcess(
        ports,
        rendered,
        log_level=log_level,
        json_log=config.log_format == "json",
        access_log=access_log,
        streams=streams,
    )
    async with app, process as envoy:
        await started()
        if not await until_asked(signals, envoy):
            return 1
        app.say_draining()
        await envoy.drain()
        await signals.run_drain(app.drain())
    return 0


def _require_distinct(config: SchedulerConfig, ports: EnvoyPorts) -> None:
    """Raise :exc:`StartupError` if two listeners have one port, or an instance is one of them."""
    listeners = [each for each in listeners_of(config) if each[0] != "prefill_listener"]
    for problem in clashes([*listeners, *ports.listeners()], config.listed()):
        raise StartupError(problem)
