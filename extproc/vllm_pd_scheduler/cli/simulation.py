"""The commands for a simulated fleet: ``sim`` and ``demo``."""

from __future__ import annotations

from typing import Annotated, cast, get_args

import typer

from ..envoy.ports import EnvoyPorts
from .options import (
    DEFAULT_PORTS,
    AdminPortOption,
    DecodeCountOption,
    EnvoyAdminPortOption,
    GrpcPortOption,
    LogLevel,
    LogLevelOption,
    PortOption,
    PrefillCountOption,
    envoy_log_level,
    fail,
    logging_at,
    run,
    with_ports,
)


def _connector(name: str) -> str:
    from ..sim.options import KvConnector

    names = get_args(KvConnector)
    if name not in names:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(names)}")
    return name


def sim(
    prefill: PrefillCountOption = 2,
    decode: DecodeCountOption = 2,
    base_port: Annotated[int, typer.Option(min=1, max=65000, help="First prefill port; decode +100.")] = 8100,
    connector: Annotated[
        str, typer.Option(callback=_connector, metavar="NAME", help="How all of them hand over.")
    ] = "nixl",
) -> None:
    """Run a simulated vLLM fleet alone, until Ctrl-C."""
    from ..service.demo import run_sim
    from ..sim.options import KvConnector

    raise typer.Exit(run_sim(prefill, decode, base_port, cast(KvConnector, connector)))


def demo(
    prefill: PrefillCountOption = 2,
    decode: DecodeCountOption = 2,
    port: PortOption = DEFAULT_PORTS.ingress,
    grpc_port: GrpcPortOption = None,
    admin_port: AdminPortOption = None,
    envoy_admin_port: EnvoyAdminPortOption = DEFAULT_PORTS.admin,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Run a simulated fleet, the scheduler and Envoy, send one request, and stay until Ctrl-C."""
    from ..config import parse_config
    from ..service import run as service
    from ..service.demo import Demo
    from ..sim.fleet import FleetError

    with logging_at(log_level) as streams:
        try:
            with Demo(prefill, decode) as running:
                settings = with_ports(parse_config(running.config()), grpc_port, admin_port)
                ports = EnvoyPorts(port, None, envoy_admin_port, settings.grpc_port, "127.0.0.1")
                started = running.show(settings, ports)
                level = envoy_log_level(log_level)
                run(service.up(settings, ports, level, started, streams, access_log=False))
        except FleetError as error:
            fail(str(error))
