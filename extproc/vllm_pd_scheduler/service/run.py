"""Runs the scheduler until a signal comes: alone (``serve``) or with an Envoy of its own (``up``)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace

from ..config import SchedulerConfig
from ..config.listeners import clashes, listeners_of
from ..envoy.configuration import render_config
from ..envoy.ports import EnvoyPorts
from ..envoy.process import EnvoyProcess, require_free
from ..models import join_address
from ..system.output import StandardStreams
from ..system.private_socket import private_socket_path
from ..system.terminal import has_terminal
from .app import App, StartupError
from .reload import ConfigFile

log = logging.getLogger(__name__)

Started = Callable[[], Awaitable[None]]
"""Called when requests can come."""


class Signals:
    """Waits for the signals that end the process.

    The first SIGTERM or SIGINT (Ctrl-C) asks for a drain. One after that ends the drain. SIGHUP calls
    ``hang_up``. From a terminal that is closed, which may send it more than once, and without ``hang_up``, it
    asks for a drain.
    """

    def __init__(self, hang_up: Callable[[], None] | None) -> None:
        self._hang_up = hang_up
        self._had_terminal = has_terminal()
        self._drain = asyncio.Event()
        self._end = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._receive)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            loop.add_signal_handler(signal.SIGHUP, self._receive_hangup)

    def _receive(self) -> None:
        if self._drain.is_set():
            self._end.set()
        else:
            self._drain.set()

    def _receive_hangup(self) -> None:
        closed = self._had_terminal and not has_terminal()
        if closed or self._hang_up is None:
            self._drain.set()
        else:
            self._hang_up()

    async def wait(self) -> None:
        """Wait until a drain is asked for."""
        await self._drain.wait()

    async def run_drain(self, drain: Awaitable[object]) -> None:
        """Run a drain until it is done or a signal ends it."""
        draining: asyncio.Future[object] = asyncio.ensure_future(drain)
        end: asyncio.Future[object] = asyncio.ensure_future(self._end.wait())
        _, pending = await asyncio.wait({draining, end}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()


async def serve(config: SchedulerConfig, streams: StandardStreams, file: ConfigFile | None = None) -> int:
    """Serve until a signal comes, drain, and return the exit status. ``file`` can be read again.

    Raise :exc:`~vllm_pd_scheduler.service.app.StartupError`.
    """
    app = App(config, streams, file)
    signals = Signals(app.hang_up if file else None)
    async with app:
        await signals.wait()
        app.say_draining()
        await signals.run_drain(app.drain())
    return 0


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

    Raise :exc:`~vllm_pd_scheduler.service.app.StartupError` or
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
        ports = replace(ports, grpc_socket=config.grpc_socket, continuation=config.continuation_port)
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
        signal_came: asyncio.Future[object] = asyncio.ensure_future(signals.wait())
        envoy_ended: asyncio.Future[object] = asyncio.ensure_future(asyncio.shield(envoy.exited))
        await asyncio.wait({signal_came, envoy_ended}, return_when=asyncio.FIRST_COMPLETED)
        envoy_ended.cancel()
        if envoy.exited.done():
            signal_came.cancel()
            log.error("Envoy ended with status %d: ending too", envoy.exited.result())
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
