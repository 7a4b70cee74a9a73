"""The commands for a real fleet: ``serve``, ``up`` and ``check``."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

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
    LogFormatOption,
    LogLevel,
    LogLevelOption,
    PortOption,
    PrefillPortOption,
    ShadowOption,
    envoy_log_level,
    logging_at,
    prefill_port_of,
    read_config,
    run,
    with_log_format,
    with_ports,
)

if TYPE_CHECKING:
    from ..config import SchedulerConfig


def serve(
    config: ConfigOption,
    interval: IntervalOption = None,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
    log_format: LogFormatOption = None,
) -> None:
    """Run the scheduler (gRPC and admin) beside an Envoy that runs elsewhere."""
    from ..service import run as service
    from ..service.reload import ConfigFile

    if interval is not None and not math.isfinite(interval):
        raise typer.BadParameter(f"{interval} is not a number of seconds", param_hint="--interval")

    def adjust(settings: SchedulerConfig) -> SchedulerConfig:
        settings = with_log_format(_with_shadow(settings, shadow), log_format)
        if interval is not None:
            settings = settings.model_copy(update={"health_check_interval": interval})
        return settings

    settings = adjust(read_config(config))
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
) -> None:
    """Run the scheduler and an Envoy on envoy/envoy.yaml; if one dies, both end."""
    from ..service import run as service
    from ..service.reload import ConfigFile

    def adjust(settings: SchedulerConfig) -> SchedulerConfig:
        settings = with_log_format(_with_shadow(settings, shadow), log_format)
        used = prefill_port_of(settings, prefill_port)
        return with_ports(settings, grpc_port, admin_port, used)

    settings = adjust(read_config(config))
    file = ConfigFile(config, settings, adjust)
    used = prefill_port_of(settings, prefill_port)
    ports = EnvoyPorts(port, used, envoy_admin_port, settings.grpc_port, host)

    async def started() -> None:
        logging.getLogger(__name__).info("Envoy listens on port %d", port)

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


def _with_shadow(config: SchedulerConfig, name: str | None) -> SchedulerConfig:
    from ..strategies import UnknownStrategy, load_strategy

    if name is None:
        return config
    try:
        load_strategy(name)
    except UnknownStrategy as error:
        raise typer.BadParameter(str(error), param_hint="--shadow") from None
    return config.model_copy(update={"shadow_strategy": name})
