"""Runs several workers until a signal comes: alone (``serve``) or with an Envoy of their own (``up``)."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..config import SchedulerConfig
from ..config.listeners import Listener, clashes, listeners_of
from ..envoy.configuration import render_config
from ..envoy.ports import EnvoyPorts
from ..envoy.process import EnvoyProcess, require_free
from ..envoy.schedulers import NAME, SchedulerAddress
from ..models import join_address
from ..rpc import ListenError
from ..rpc.listener import MAX_PATH_BYTES
from ..system.output import StandardStreams
from ..system.private_socket import private_socket_path
from .signals import Signals, until_asked
from .startup_error import StartupError
from .worker import Worker, scheduler_name
from .workers import WorkerEnded, Workers, worker_command

_LONGEST_SUFFIX = ".admin-w99"
"""Of the sockets beside the parent's."""

log = logging.getLogger(__name__)


async def serve_with_workers(
    config: SchedulerConfig, file: Path, count: int, arguments: Sequence[str]
) -> int:
    """Have workers serve until a signal comes, and drain; return the exit status.

    ``file`` is where the configuration comes from. ``arguments`` are those of the command ``worker`` that say
    what to run. Raise :exc:`~vllm_pd_scheduler.service.startup_error.StartupError`.
    """
    require_ports(config, count, listeners_of(config))
    with _private_path() as path:
        workers = _workers(file, count, arguments, path)
        signals = Signals(lambda: workers.signal(signal.SIGHUP))
        try:
            async with workers:
                await signals.wait()
                workers.signal(signal.SIGTERM)
                await signals.run_drain(workers.ended())
        except (WorkerEnded, ListenError) as error:
            return _failed(error)
    return 0


async def up_with_workers(
    config: SchedulerConfig,
    file: Path,
    ports: EnvoyPorts,
    count: int,
    arguments: Sequence[str],
    log_level: str,
    started: Callable[[], Awaitable[None]],
    streams: StandardStreams,
) -> int:
    """Have workers serve an Envoy of our own until a signal comes, and drain; return the exit status.

    They speak over sockets that only this user can open, unless the configuration names one, or a port. The
    status is 1 if Envoy ends first. Raise :exc:`~vllm_pd_scheduler.service.startup_error.StartupError` or
    :exc:`~vllm_pd_scheduler.envoy.process.EnvoyError`.
    """
    if config.grpc_tls:
        raise StartupError("grpc_tls: Envoy beside the workers is reached in clear: use serve, not up")
    ports = replace(ports, continuation=config.continuation_port, continues=count)
    ingress = f"http://{join_address(ports.ingress_address, ports.ingress)}"
    arguments = [*arguments, "--continuation-ingress", ingress]
    require_free(ports)
    with _private_path() as path:
        if config.grpc_socket is None and not config.model_fields_set & {"grpc_host", "grpc_port"}:
            config = config.model_copy(update={"grpc_socket": f"{path}.grpc"})
            arguments = [*arguments, "--grpc-socket", f"{path}.grpc"]
        own = [each for each in listeners_of(config) if each[0] != "prefill_listener"]
        require_ports(config, count, [*own, *ports.listeners()])
        rendered = render_config(
            ports,
            config.instance_tls,
            config.stream_idle_timeout,
            config.max_retries,
            config.public_paths,
            addresses(config, count),
        )
        envoy = EnvoyProcess(
            ports,
            rendered,
            log_level=log_level,
            json_log=config.log_format == "json",
            streams=streams,
            schedulers=count,
        )
        workers = _workers(file, count, arguments, path)
        signals = Signals(lambda: workers.signal(signal.SIGHUP))
        try:
            async with workers, envoy:
                return await _serve_envoy(workers, envoy, signals, started)
        except (WorkerEnded, ListenError) as error:
            return _failed(error)


async def _serve_envoy(
    workers: Workers, envoy: EnvoyProcess, signals: Signals, started: Callable[[], Awaitable[None]]
) -> int:
    await started()
    if not await until_asked(signals, envoy):
        return 1
    workers.signal(signal.SIGTERM)
    await envoy.drain()
    await signals.run_drain(workers.ended())
    return 0


def addresses(config: SchedulerConfig, count: int) -> list[SchedulerAddress]:
    """Return where workers listen for an Envoy on this machine."""
    found = []
    for worker in (Worker(index, count, "") for index in range(count)):
        own = worker.own_ports(config)
        address = own.grpc_socket or f"127.0.0.1:{own.grpc_port}"
        found.append(SchedulerAddress(address, scheduler_name(config, worker)))
    return found


def _workers(file: Path, count: int, arguments: Sequence[str], path: str) -> Workers:
    first = Worker(0, count, path)
    try:
        Path(first.started).write_bytes(file.read_bytes())
        Path(first.secret).write_text(secrets.token_hex(16), encoding="ascii")
    except OSError as error:
        raise StartupError(f"{file}: {error.strerror}") from None
    command = worker_command([*arguments, "--workers", str(count), "--hub", path])
    return Workers(count, command, path)


@contextmanager
def _private_path() -> Iterator[str]:
    try:
        place = private_socket_path()
        path = place.__enter__()
    except OSError as error:
        raise StartupError(
            f"--workers: no directory can be made for the workers' sockets ({error.strerror}): set TMPDIR to "
            "where one can"
        ) from None
    try:
        if len(os.fsencode(f"{path}{_LONGEST_SUFFIX}")) > MAX_PATH_BYTES:
            raise StartupError(
                f"--workers: the path of a socket in {os.path.dirname(path)} would have more than "
                f"{MAX_PATH_BYTES} bytes: set TMPDIR to a directory with a shorter one"
            )
        yield path
    finally:
        place.__exit__(None, None, None)


def require_ports(config: SchedulerConfig, count: int, listeners: list[Listener]) -> None:
    """Raise :exc:`StartupError` if a worker's ports are none, or another's.

    ``listeners`` are those of the first, and of who else listens beside them.
    """
    listeners = list(listeners)
    last = scheduler_name(config, Worker(count - 1, count, ""))
    if not NAME.fullmatch(last):
        raise StartupError(f"replicas.name: {last!r} has more than 16 letters: choose a shorter one")
    for worker in (Worker(index, count, "") for index in range(1, count)):
        own = worker.own_ports(config)
        if config.grpc_socket is None:
            listeners.append((f"grpc_port of worker {worker.name}", own.grpc_host, own.grpc_port))
        if own.continuation_port is not None:
            listeners.append(
                (f"continuation_port of worker {worker.name}", "127.0.0.1", own.continuation_port)
            )
        if own.metaserver_port is not None:
            key = f"metaserver_port of worker {worker.name}"
            listeners.append((key, own.metaserver_host, own.metaserver_port))
    for name, _, port in listeners:
        if port > 65535:
            raise StartupError(f"--workers: {name} would be {port}: choose a lower one for the first")
    for problem in clashes(listeners, config.listed()):
        key, of_a_worker, _ = problem.partition(" of worker ")
        more = f"; each worker takes the next port: choose another {key} for the first" if of_a_worker else ""
        raise StartupError(f"{problem}{more}")


def _failed(error: WorkerEnded | ListenError) -> int:
    log.error("%s", error)
    return error.status if isinstance(error, WorkerEnded) and error.status > 0 else 1
