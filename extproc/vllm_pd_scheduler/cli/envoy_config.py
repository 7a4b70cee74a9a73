"""``envoy-config``: the configuration for an Envoy of the operator's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..envoy.ports import PREFILL_PORT, EnvoyPorts
from .options import (
    DEFAULT_PORTS,
    EnvoyAdminPortOption,
    GrpcPortOption,
    HostOption,
    PortOption,
    PrefillPortOption,
    WorkersOption,
    prefill_port_of,
    read_config,
    worker_count,
)

if TYPE_CHECKING:
    from ..config import SchedulerConfig
    from ..envoy.schedulers import SchedulerAddress


def envoy_config(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="The scheduler's JSON configuration, which says much of Envoy's: see docs/cli.md.",
        ),
    ] = None,
    host: HostOption = None,
    port: PortOption = DEFAULT_PORTS.ingress,
    prefill_port: PrefillPortOption = None,
    grpc_port: GrpcPortOption = None,
    envoy_admin_port: EnvoyAdminPortOption = DEFAULT_PORTS.admin,
    scheduler: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ADDRESS[,PRIORITY]",
            help="One of several schedulers: host:port or a socket's path. See docs/cli.md.",
        ),
    ] = None,
    workers: WorkersOption = "1",
) -> None:
    """Print the configuration for an Envoy beside `serve`, as YAML.

    With nothing to change it is the file that ships, with its comments.
    """
    import yaml

    from ..config import SchedulerConfig
    from ..envoy.configuration import config_path, render_config

    if config is not None:
        settings = read_config(config)
        prefill = prefill_port_of(settings, prefill_port)
    else:
        settings, prefill = SchedulerConfig(), prefill_port or PREFILL_PORT
    grpc = (settings.grpc_port, host, settings.grpc_socket) if grpc_port is None else (grpc_port, host)
    ports = EnvoyPorts(port, prefill, envoy_admin_port, *grpc)
    if config is not None:
        count = worker_count(workers)
        ports = replace(ports, continuation=settings.continuation_port, continues=count)
    try:
        rendered = render_config(
            ports,
            settings.instance_tls,
            settings.stream_idle_timeout,
            settings.max_retries,
            settings.public_paths,
            _schedulers(settings, grpc_port, scheduler or [], worker_count(workers)),
            settings.grpc_tls,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--scheduler") from None
    shipped = config_path().read_text(encoding="utf-8")
    if rendered == yaml.safe_load(shipped):
        typer.echo(shipped, nl=False)
    else:
        typer.echo(_as_yaml(rendered), nl=False)


def _schedulers(
    settings: SchedulerConfig, grpc_port: int | None, given: list[str], workers: int
) -> list[SchedulerAddress]:
    """Return the schedulers that are given, or the workers; none if there is one, where the ports say."""
    from ..config.listeners import listeners_of
    from ..envoy.schedulers import SchedulerAddress
    from ..service.run_workers import addresses, require_ports
    from ..service.startup_error import StartupError

    if given and workers > 1:
        raise ValueError("each worker is a scheduler of its own: give a --scheduler for each, or --workers")
    if given and grpc_port is not None:
        raise ValueError("it has the port of each scheduler: leave out --grpc-port")
    if workers == 1:
        return [SchedulerAddress.parse(each) for each in given]
    if grpc_port is not None:
        settings = settings.model_copy(update={"grpc_port": grpc_port, "grpc_socket": None})
    try:
        require_ports(settings, workers, listeners_of(settings))
    except StartupError as error:
        raise typer.BadParameter(str(error), param_hint="--workers") from None
    return addresses(settings, workers)


def _as_yaml(config: dict[str, Any]) -> str:
    """Return YAML that has each thing where it is used, and scripts as they are read."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def script(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, script)
    return yaml.dump(config, Dumper=Dumper, sort_keys=False, width=110)
