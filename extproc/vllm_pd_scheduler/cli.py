"""The command line: ``vllm-pd-scheduler`` and ``python -m vllm_pd_scheduler``."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import uvloop

# Starting Envoy forks. gRPC has nothing to do in that child, and would say so on stderr if it were not told
# before it is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
# The poller thread reads from sockets itself, which saves a thread hop for each message: 9 to 15 % of the CPU
# per request (grpcio 1.85, 16 and 1 clients, alternating runs). A gRPC that does not know it says so once.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

from .app import StartupError
from .config import ConfigError, SchedulerConfig, load_config, parse_config
from .envoy_process import EnvoyError, EnvoyPorts
from .models import join_address
from .replay.cli import replay
from .server import serve as run_serve
from .server import up as run_up
from .strategies import UnknownStrategy, load_strategy

app = typer.Typer(
    help="Routes requests to a vLLM fleet whose prefill and decode run on separate instances.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class LogLevel(StrEnum):
    """Names of Python's log levels."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


_DEFAULTS = EnvoyPorts()

ConfigOption = Annotated[Path, typer.Option("--config", help="JSON configuration file.")]
IntervalOption = Annotated[
    float | None,
    typer.Option("--interval", min=0.05, help="Seconds between health checks."),
]
ShadowOption = Annotated[
    str | None,
    typer.Option("--shadow", help="A second strategy, that is only compared: see GET /shadow of the admin."),
]
LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", help="What is logged, to stderr.")]
PortOption = Annotated[int, typer.Option("--port", min=1, max=65535, help="Envoy's ingress: clients.")]
PrefillPortOption = Annotated[int, typer.Option(min=1, max=65535, help="Envoy's loopback prefill listener.")]
GrpcPortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="ext_proc and EDS.")]
AdminPortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="The scheduler's admin HTTP.")]
EnvoyAdminPortOption = Annotated[int, typer.Option(min=1, max=65535, help="Envoy's own admin.")]


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", help="JSON configuration file.")] = None,
    interval: IntervalOption = None,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Serve, if no other command is given."""
    if context.invoked_subcommand is not None:
        if config is not None or interval is not None or shadow is not None:
            raise typer.BadParameter(f"give the options after {context.invoked_subcommand!r}")
        return
    if config is None:
        typer.echo(context.get_help())
        typer.echo("\nvllm-pd-scheduler: a command, or --config FILE to serve, is needed", err=True)
        raise typer.Exit(2)
    serve(config, interval, shadow, log_level)


@app.command()
def serve(
    config: ConfigOption,
    interval: IntervalOption = None,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run the scheduler (gRPC and admin) beside an Envoy that runs elsewhere."""
    settings = _with_shadow(_load(config), shadow)
    if interval is not None:
        if not math.isfinite(interval):
            raise typer.BadParameter(f"{interval} is not a number of seconds", param_hint="--interval")
        settings = settings.model_copy(update={"health_check_interval": interval})
    _log_to_stderr(log_level)
    _run(run_serve(settings))


@app.command()
def up(
    config: ConfigOption,
    port: PortOption = _DEFAULTS.ingress,
    prefill_port: PrefillPortOption = _DEFAULTS.prefill,
    grpc_port: GrpcPortOption = None,
    admin_port: AdminPortOption = None,
    envoy_admin_port: EnvoyAdminPortOption = _DEFAULTS.admin,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run the scheduler and an Envoy on envoy/envoy.yaml; if one dies, both end."""
    settings = _with_ports(_with_shadow(_load(config), shadow), prefill_port, grpc_port, admin_port)
    ports = EnvoyPorts(port, prefill_port, envoy_admin_port, settings.grpc_port)
    _log_to_stderr(log_level)

    async def started() -> None:
        logging.getLogger(__name__).info("Envoy listens on port %d", port)

    _run(run_up(settings, ports, _envoy_log_level(log_level), started))


@app.command()
def check(config: ConfigOption) -> None:
    """Validate a configuration and print it with its defaults, or print everything that is wrong."""
    typer.echo(_load(config).model_dump_json(indent=2))


@app.command()
def sim(
    prefill: Annotated[int, typer.Option(min=1, max=64, help="Prefill instances.")] = 2,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode instances.")] = 2,
    base_port: Annotated[int, typer.Option(min=1, max=65000, help="First prefill port; decode +100.")] = 8100,
) -> None:
    """Run a simulated vLLM fleet alone, until Ctrl-C."""
    from .demo import run_sim

    raise typer.Exit(run_sim(prefill, decode, base_port))


@app.command()
def demo(
    prefill: Annotated[int, typer.Option(min=1, max=64, help="Prefill instances.")] = 2,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode instances.")] = 2,
    port: PortOption = _DEFAULTS.ingress,
    prefill_port: PrefillPortOption = _DEFAULTS.prefill,
    grpc_port: GrpcPortOption = None,
    admin_port: AdminPortOption = None,
    envoy_admin_port: EnvoyAdminPortOption = _DEFAULTS.admin,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Run a simulated fleet, the scheduler and Envoy, send one request, and stay until Ctrl-C."""
    from .demo import Demo
    from .sim.fleet import FleetError

    _log_to_stderr(log_level)
    try:
        with Demo(prefill, decode) as running:
            settings = _with_ports(parse_config(running.config()), prefill_port, grpc_port, admin_port)
            ports = EnvoyPorts(port, prefill_port, envoy_admin_port, settings.grpc_port, "127.0.0.1")
            started = running.show(settings, ports)
            _run(run_up(settings, ports, _envoy_log_level(log_level), started, access_log=False))
    except FleetError as error:
        _fail(str(error))


app.command()(replay)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="vllm-pd-scheduler")


def _load(path: Path) -> SchedulerConfig:
    try:
        return load_config(path)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def _with_shadow(config: SchedulerConfig, name: str | None) -> SchedulerConfig:
    if name is None:
        return config
    try:
        load_strategy(name)
    except UnknownStrategy as error:
        raise typer.BadParameter(str(error), param_hint="--shadow") from None
    return config.model_copy(update={"shadow_strategy": name})


def _with_ports(
    config: SchedulerConfig, prefill_port: int, grpc_port: int | None, admin_port: int | None
) -> SchedulerConfig:
    changed: dict[str, Any] = {"prefill_listener": f"http://{join_address('127.0.0.1', prefill_port)}"}
    if grpc_port is not None:
        changed["grpc_port"] = grpc_port
    if admin_port is not None:
        changed["admin_port"] = admin_port
    return config.model_copy(update=changed)


def _log_to_stderr(level: LogLevel) -> None:
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("grpc").setLevel(logging.WARNING)  # its DEBUG has a line for every message


def _envoy_log_level(level: LogLevel) -> str:
    """Envoy's own INFO is some hundred lines at start: show it only with DEBUG."""
    return {"DEBUG": "info", "INFO": "warning", "WARNING": "error"}.get(level, "critical")


def _run(main: Coroutine[Any, Any, int]) -> None:
    try:
        status = uvloop.run(main)
    except (StartupError, EnvoyError, UnknownStrategy) as error:
        _fail(str(error))
    if status:
        raise typer.Exit(status)


def _fail(message: str) -> NoReturn:
    typer.echo(f"vllm-pd-scheduler: {message}", err=True)
    raise typer.Exit(1)
