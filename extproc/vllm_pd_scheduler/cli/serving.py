"""The commands for a real fleet: ``serve``, ``up`` and ``check``."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..envoy.ports import EnvoyPorts
from .options import (
    DEFAULT_PORTS,
    AdminPortOption,
    ConfigOption,
    EnvoyAdminPortOption,
    GrpcPortOption,
    HostOption,
    IntervalOption,
    LogFormat,
    LogFormatOption,
    LogLevel,
    LogLevelOption,
    PortOption,
    PrefillPortOption,
    ShadowOption,
    WorkersOption,
    envoy_log_level,
    logging_at,
    prefill_port_of,
    read_config,
    run,
    with_log_format,
    with_ports,
    worker_count,
)

if TYPE_CHECKING:
    from ..config import SchedulerConfig


def serve(
    config: ConfigOption,
    interval: IntervalOption = None,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
    log_format: LogFormatOption = None,
    workers: WorkersOption = "1",
) -> None:
    """Run the scheduler (gRPC and admin) beside an Envoy that runs elsewhere."""
    if interval is not None and not math.isfinite(interval):
        raise typer.BadParameter(f"{interval} is not a number of seconds", param_hint="--interval")

    def adjust(settings: SchedulerConfig) -> SchedulerConfig:
        settings = with_log_format(_with_shadow(settings, shadow), log_format)
        return _with_interval(settings, interval)

    settings = adjust(read_config(config))
    if (count := worker_count(workers)) > 1:
        from ..service.run_workers import serve_with_workers

        arguments = worker_arguments(config, log_level, interval, shadow, log_format)
        with logging_at(log_level, settings.log_format):
            run(serve_with_workers(settings, config, count, arguments))
        return
    from ..service import run as service
    from ..service.reload import ConfigFile

    file = ConfigFile(config, settings, adjust)
    with logging_at(log_level, settings.log_format) as streams:
        run(service.serve(settings, streams, file))


def up(
    config: ConfigOption,
    host: HostOption = None,
    port: PortOption = DEFAULT_PORTS.ingress,
    prefill_port: PrefillPortOption = None,
    grpc_port: GrpcPortOption = None,
    admin_port: AdminPortOption = None,
    envoy_admin_port: EnvoyAdminPortOption = DEFAULT_PORTS.admin,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
    log_format: LogFormatOption = None,
    workers: WorkersOption = "1",
) -> None:
    """Run the scheduler and an Envoy on envoy/envoy.yaml; if one dies, both end."""

    def adjust(settings: SchedulerConfig) -> SchedulerConfig:
        settings = with_log_format(_with_shadow(settings, shadow), log_format)
        used = prefill_port_of(settings, prefill_port)
        return with_ports(settings, grpc_port, admin_port, used)

    settings = adjust(read_config(config))
    used = prefill_port_of(settings, prefill_port)
    ports = EnvoyPorts(port, used, envoy_admin_port, settings.grpc_port, host)

    async def started() -> None:
        logging.getLogger(__name__).info("Envoy listens on port %d", port)

    if (count := worker_count(workers)) > 1:
        from ..service.run_workers import up_with_workers

        arguments = worker_arguments(
            config, log_level, None, shadow, log_format, grpc_port, admin_port, prefill_port
        )
        level = envoy_log_level(log_level)
        with logging_at(log_level, settings.log_format) as streams:
            run(up_with_workers(settings, config, ports, count, arguments, level, started, streams))
        return
    from ..service import run as service
    from ..service.reload import ConfigFile

    file = ConfigFile(config, settings, adjust)
    with logging_at(log_level, settings.log_format) as streams:
        run(service.up(settings, ports, envoy_log_level(log_level), started, streams, file=file))


def check(config: ConfigOption) -> None:
    """Validate a configuration and print it with its defaults, or print everything that is wrong."""
    from ..config import read_instances
    from ..discovery import CONFIG, merge
    from ..discovery.files import source_of
    from ..envoy.configuration import num_retries
    from ..scheduler.misfits import misfits
    from ..scheduler.rehearsal import rehearse

    settings = read_config(config)
    problems = rehearse(settings)
    for problem in problems:
        typer.echo(f"{config}: {problem}", err=True)
    if problems:
        raise typer.Exit(2)
    told = {CONFIG: list(settings.instances())}
    told |= {source_of(path): read_instances(path, settings) for path in settings.instance_files}
    merged = merge(told)
    notes = list(merged.refused)
    if not settings.discovery:  # else there may be others
        notes += misfits(settings, (member.instance for member in merged.members.values()))
    for note in notes:
        typer.echo(f"{config}: note: {note}", err=True)
    if settings.max_retries > (shipped := num_retries()):
        typer.echo(
            f"{config}: note: max_retries is {settings.max_retries}, but num_retries in envoy/envoy.yaml "
            f"is {shipped}: `up` and `envoy-config --config` set it to the same, in an Envoy of yours you do",
            err=True,
        )
    typer.echo(settings.model_dump_json(indent=2))


def worker_arguments(
    config: Path,
    log_level: LogLevel,
    interval: float | None,
    shadow: str | None,
    log_format: LogFormat | None,
    grpc_port: int | None = None,
    admin_port: int | None = None,
    prefill_port: int | None = None,
) -> list[str]:
    """Return the arguments of the command ``worker`` that say what the options here say."""
    given = {
        "config": config,
        "log-level": log_level.value,
        "interval": interval,
        "shadow": shadow,
        "log-format": log_format and log_format.value,
        "grpc-port": grpc_port,
        "admin-port": admin_port,
        "prefill-port": prefill_port,
    }
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def worker(
    config: ConfigOption,
    worker: Annotated[int, typer.Option(help="Which one it is, from 0.")],
    workers: Annotated[int, typer.Option(help="How many there are.")],
    hub: Annotated[str, typer.Option(help="Path of the parent's socket.")],
    parent: Annotated[int, typer.Option(help="The parent's process id.")],
    interval: IntervalOption = None,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
    log_format: LogFormatOption = None,
    grpc_port: GrpcPortOption = None,
    grpc_socket: Annotated[str | None, typer.Option(help="In place of a port.")] = None,
    admin_port: AdminPortOption = None,
    prefill_port: PrefillPortOption = None,
    continuation_ingress: Annotated[str | None, typer.Option(help="Where Envoy listens.")] = None,
) -> None:
    """Run one of several workers: `serve` and `up` start it."""
    from ..system.parent_death import die_with_parent

    die_with_parent(parent)
    from ..config import ConfigError, compare, load_config
    from ..service import run as service
    from ..service.reload import ConfigFile
    from ..service.worker import Worker

    this = Worker(worker, workers, hub)

    def adjust(settings: SchedulerConfig) -> SchedulerConfig:
        settings = with_log_format(_with_shadow(settings, shadow), log_format)
        settings = _with_interval(settings, interval)
        if grpc_port is not None or admin_port is not None or prefill_port is not None:
            settings = with_ports(settings, grpc_port, admin_port, prefill_port_of(settings, prefill_port))
        if grpc_socket is not None:
            settings = settings.model_copy(update={"grpc_socket": grpc_socket})
        if continuation_ingress is not None:
            settings = settings.model_copy(update={"continuation_ingress": continuation_ingress})
        return this.own_ports(settings)

    # What needs a restart of all is as at the parent's start: Envoy knows this worker's address from then.
    settings = adjust(read_config(Path(this.started)))
    with logging_at(log_level, settings.log_format, this.name) as streams:
        try:
            found = adjust(load_config(config))
            settings.take(found, compare(settings, found).changed)
        except ConfigError as error:
            logging.getLogger(__name__).error("the configuration is as at the start: %s", error)
        file = ConfigFile(config, settings, adjust)
        run(service.serve(settings, streams, file, this))


def _with_interval(config: SchedulerConfig, interval: float | None) -> SchedulerConfig:
    return config if interval is None else config.model_copy(update={"health_check_interval": interval})


def _with_shadow(config: SchedulerConfig, name: str | None) -> SchedulerConfig:
    from ..strategies import UnknownStrategy, load_strategy

    if name is None:
        return config
    try:
        load_strategy(name)
    except UnknownStrategy as error:
        raise typer.BadParameter(str(error), param_hint="--shadow") from None
    return config.model_copy(update={"shadow_strategy": name})
