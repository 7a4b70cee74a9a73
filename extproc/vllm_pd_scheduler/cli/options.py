"""What several commands share: options, reading the configuration, logging, running and failing.

The rooms below are imported inside functions, here and in all files of commands: they take most of a second
to load, and who asks for ``status`` or completes a word in a shell needs none of them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import urlsplit

import typer

from ..envoy.ports import EnvoyPorts
from ..models import is_ip, join_address

if TYPE_CHECKING:
    from ..config import SchedulerConfig
    from ..system.output import StandardStreams
    from ..telemetry import log_lines


class LogLevel(StrEnum):
    """Names of Python's log levels."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class LogFormat(StrEnum):
    """How a line of the log looks."""

    TEXT = "text"
    JSON = "json"


DEFAULT_PORTS = EnvoyPorts()
MAX_WORKERS = 64


def _ip_address(value: str | None) -> str | None:
    bare = value and value.removeprefix("[").removesuffix("]")
    if bare and not is_ip(bare):
        raise typer.BadParameter(f"{value!r} is not an IP address")
    return bare or None


ConfigOption = Annotated[Path, typer.Option("--config", help="JSON configuration file.")]
IntervalOption = Annotated[
    float | None,
    typer.Option("--interval", min=0.05, max=3600, help="Seconds between health checks."),
]
ShadowOption = Annotated[
    str | None,
    typer.Option("--shadow", help="A second strategy, that is only compared: see GET /shadow of the admin."),
]
LogLevelOption = Annotated[
    LogLevel, typer.Option("--log-level", case_sensitive=False, help="What is logged, to stderr.")
]
LogFormatOption = Annotated[
    LogFormat | None,
    typer.Option("--log-format", case_sensitive=False, help="How a line looks; in place of log_format."),
]
PortOption = Annotated[int, typer.Option("--port", min=1, max=65535, help="Envoy's ingress: clients.")]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host",
        metavar="IP",
        show_default="0.0.0.0",
        help="IP address of Envoy's ingress; '::' is all, IPv6 and IPv4.",
        callback=_ip_address,
    ),
]
PrefillPortOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65535,
        show_default="that of prefill_listener",
        help="Envoy's loopback prefill listener, if the configuration sets prefill_listener.",
    ),
]
GrpcPortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="ext_proc and EDS.")]
AdminPortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="The scheduler's admin HTTP.")]
EnvoyAdminPortOption = Annotated[int, typer.Option(min=1, max=65535, help="Envoy's own admin.")]
WorkersOption = Annotated[
    str,
    typer.Option("--workers", metavar="N|auto", help="Processes that share the work; auto: one for 4 cores."),
]
PrefillCountOption = Annotated[int, typer.Option(min=1, max=64, help="Prefill instances.")]
DecodeCountOption = Annotated[int, typer.Option(min=1, max=64, help="Decode instances.")]


def read_config(path: Path) -> SchedulerConfig:
    """Return the configuration in a file; print everything wrong with it and exit with 2 if it has errors."""
    from ..config import ConfigError, load_config

    try:
        return load_config(path)
    except ConfigError as error:
        fail_with_2(str(error))


def prefill_port_of(config: SchedulerConfig, given: int | None) -> int | None:
    """Return the port of Envoy's prefill listener: what is given on the command line, else the setting's.

    ``None`` if the configuration sets no ``prefill_listener``: then Envoy needs none.
    """
    if config.prefill_listener is None:
        return None
    return given or urlsplit(config.prefill_listener).port or 80


def with_ports(
    config: SchedulerConfig, grpc_port: int | None, admin_port: int | None, prefill_port: int | None = None
) -> SchedulerConfig:
    """Return a copy of the configuration, for an Envoy that we run, with the ports that are given."""
    update: dict[str, Any] = {}
    if prefill_port is not None:
        update["prefill_listener"] = f"http://{join_address('127.0.0.1', prefill_port)}"
    if grpc_port is not None:
        update["grpc_port"] = grpc_port
    if admin_port is not None:
        update["admin_port"] = admin_port
    return config.model_copy(update=update)


def with_log_format(config: SchedulerConfig, kind: LogFormat | None) -> SchedulerConfig:
    """Return a copy of the configuration with this format of the log, if one is given."""
    return config if kind is None else config.model_copy(update={"log_format": kind.value})


@contextmanager
def logging_at(
    level: LogLevel, kind: log_lines.LogFormat = "text", worker: str = ""
) -> Iterator[StandardStreams]:
    """Log to stderr from ``level`` on, as a worker if one is named.

    In the block, whoever prints or logs does not wait for a reader.
    """
    from ..system.output import StandardStreams
    from ..telemetry import log_lines

    with StandardStreams() as streams:
        lines = logging.StreamHandler(sys.stderr)
        lines.setFormatter(log_lines.formatter(kind, worker))
        logging.basicConfig(level=level, handlers=[lines])
        logging.captureWarnings(True)
        logging.getLogger("hpack").setLevel(logging.WARNING)  # its DEBUG logs each header of a call
        logging.getLogger("watchfiles").setLevel(
            logging.WARNING
        )  # its INFO logs that a directory has changed
        yield streams


def worker_count(given: str) -> int:
    """Return how many workers are asked for; exit with 2 if that is no number of them."""
    from ..service.workers import automatic_count

    if given == "auto":
        return automatic_count()
    if not (given.isascii() and given.isdecimal() and 1 <= int(given[:6]) <= MAX_WORKERS):
        raise typer.BadParameter(f"{given!r} is neither auto nor 1 to {MAX_WORKERS}", param_hint="--workers")
    return int(given)


def envoy_log_level(level: LogLevel) -> str:
    """Return the log level of Envoy for one of ours.

    It is one level less: at INFO, Envoy prints some hundred lines when it starts.
    """
    return {"DEBUG": "info", "INFO": "warning", "WARNING": "error"}.get(level, "critical")


def run(main: Coroutine[Any, Any, int]) -> None:
    """Run a service to its end on uvloop. Exit with its status if that is not 0, or 1 if it cannot start."""
    import uvloop

    from ..envoy.process import EnvoyError
    from ..service.startup_error import StartupError
    from ..strategies import UnknownStrategy

    try:
        status = uvloop.run(main)
    except (StartupError, EnvoyError, UnknownStrategy) as error:
        fail(str(error))
    if status:
        raise typer.Exit(status)


def fail_with_2(problems: str) -> NoReturn:
    """Print what is wrong with what was given, and exit with status 2."""
    typer.echo(problems, err=True)
    raise typer.Exit(2) from None


def fail(message: str) -> NoReturn:
    """Print a message to stderr and exit with status 1."""
    typer.echo(f"vllm-pd-scheduler: {message}", err=True)
    raise typer.Exit(1)
