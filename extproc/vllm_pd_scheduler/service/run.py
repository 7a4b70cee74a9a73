"""Running the scheduler as a process: alone (``serve``) or with an Envoy of its own (``up``)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace

from ..config import SchedulerConfig
from ..config.listeners import clashes, listeners_of
from ..envoy.process import EnvoyPorts, EnvoyProcess, render_config
from ..system.output import StandardStreams
from ..system.private_socket import private_socket_path
from .app import App, StartupError

log = logging.getLogger(__name__)

Started = Callable[[], Awaitable[None]]


class Signals:
    """The signals that end the service, as something to wait for.

    The first asks for a drain, a second SIGTERM or Ctrl-C for the end of that. SIGHUP, which a closed
    terminal sends more than once, only ever asks for the drain.
    """

    def __init__(self) -> None:
        self._first = asyncio.Event()
        self._second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(signal.SIGHUP, self._first.set)

    def _received(self) -> None:
        (self._second if self._first.is_set() else self._first).set()

    async def first(self) -> None:
        """Wait for the first signal."""
        await self._first.wait()

    async def cut_short(self, drain: Awaitable[object]) -> None:
        """Wait for a drain to end, but no longer than until the second signal."""
        work: asyncio.Future[object] = asyncio.ensure_future(drain)
        second: asyncio.Future[object] = asyncio.ensure_future(self._second.wait())
        _, pending = await asyncio.wait({work, second}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()


async def serve(config: SchedulerConfig, streams: StandardStreams) -> int:
    """Serve until a signal comes, drain, and return the exit status.

    Raises :exc:`~vllm_pd_scheduler.service.app.StartupError`.
    """
    signals = Signals()
    async with App(config, streams) as app:
        await signals.first()
        log.info("draining: %d requests in flight", app.ext_proc.open_streams)
        await signals.cut_short(app.drain())
    return 0


async def up(
    config: SchedulerConfig,
    ports: EnvoyPorts,
    log_level: str,
    started: Started,
    streams: StandardStreams,
    *,
    access_log: bool = True,
) -> int:
    """Serve with an Envoy of our own until a signal comes; if Envoy ends before that, the status is 1.

    ``started`` is called when requests can come; what Envoy prints goes through ``streams``. The two speak
    over a socket that only this user can open, unless the configuration names another, or a port.

    Raises :exc:`~vllm_pd_scheduler.service.app.StartupError` or
    :exc:`~vllm_pd_scheduler.envoy.process.EnvoyError`.
    """
    if config.grpc_tls:
        raise StartupError("grpc_tls: Envoy beside the scheduler is reached in clear: use serve, not up")
    ports.require_free()
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
        ports = replace(ports, grpc_socket=config.grpc_socket)
        _require_distinct(config, ports)
        return await _up(config, ports, log_level, started, streams, access_log)


async def _up(
    config: SchedulerConfig,
    ports: EnvoyPorts,
    log_level: str,
    started: Started,
    streams: StandardStreams,
    access_log: bool,
) -> int:
    signals = Signals()
    envoys = render_config(ports, config.instance_tls, config.stream_idle_timeout, config.max_retries)
    process = EnvoyProcess(ports, envoys, log_level=log_level, access_log=access_log, streams=streams)
    async with App(config, streams) as app, process as envoy:
        await started()
        asked: asyncio.Future[object] = asyncio.ensure_future(signals.first())
        ended: asyncio.Future[object] = asyncio.ensure_future(asyncio.shield(envoy.exited))
        await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if envoy.exited.done():
            asked.cancel()
            log.error("Envoy ended with status %d: ending too", envoy.exited.result())
            return 1
        log.info("draining: %d requests in flight", app.ext_proc.open_streams)
        await envoy.drain()
        await signals.cut_short(app.drain())
    return 0


def _require_distinct(config: SchedulerConfig, ports: EnvoyPorts) -> None:
    """Raise :exc:`StartupError` if two listen at one port, or an instance is one of us."""
    listeners = [each for each in listeners_of(config) if each[0] != "prefill_listener"]
    for problem in clashes([*listeners, *ports.listeners()], config.listed()):
        raise StartupError(problem)
