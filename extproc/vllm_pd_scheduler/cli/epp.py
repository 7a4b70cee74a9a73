"""The command ``epp``: an endpoint picker for inference gateways, with the flags of llm-d's."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .llmd_flags import FlagError, read_duration, read_flags, read_ports
from .options import LogFormat, LogLevel, fail_with_2, logging_at, run

POOL_GROUP = "inference.networking.k8s.io"

GRPC_HEALTH_PORT, METRICS_PORT, ADMIN_PORT = 9003, 9090, 9004
"""Where health and metrics are looked for; the admin interface is elsewhere than it is without a picker."""

DEBUG_FROM = 4
"""From this ``-v`` on llm-d logs what it calls debug."""

_NOTES = "vllm_pd_scheduler.notes"


class ZapEncoder(StrEnum):
    """How llm-d writes its log."""

    JSON = "json"
    CONSOLE = "console"


class GoCommand(TyperCommand):
    """A command whose flags may be spelled as Go's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; what is not followed is noted for the command to say."""
        options = [each for each in self.params if each.name != "help"]
        booleans = {_bare(name) for each in options if each.secondary_opts for name in each.opts}
        valued = {_bare(name) for each in options for name in each.opts} - booleans
        try:
            ours, ctx.meta[_NOTES] = read_flags(args, booleans, valued)
        except FlagError as error:
            raise typer.BadParameter(str(error), param_hint=f"--{error.flag}") from None
        return super().parse_args(ctx, ours)


def _bare(name: str) -> str:
    return name.lstrip("-")


def epp(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", help="JSON configuration file, for all else.")
    ] = None,
    pool_name: Annotated[str | None, typer.Option("--pool-name", help="InferencePool to pick from.")] = None,
    pool_namespace: Annotated[
        str | None,
        typer.Option("--pool-namespace", envvar="NAMESPACE", help="Its namespace, or that of the pods."),
    ] = None,
    pool_group: Annotated[
        str, typer.Option("--pool-group", help="API group of InferencePool; only v1 is read.")
    ] = POOL_GROUP,
    endpoint_selector: Annotated[
        str | None,
        typer.Option("--endpoint-selector", help="Label selector of the pods, in place of a pool."),
    ] = None,
    endpoint_target_ports: Annotated[
        list[str] | None,
        typer.Option("--endpoint-target-ports", help="Ports of these pods: 8000,8001."),
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option("--grpc-port", show_default="9002", help="ext_proc.")
    ] = None,
    grpc_health_port: Annotated[
        int | None, typer.Option("--grpc-health-port", show_default="9003", help="gRPC health, in clear.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", show_default="9090", help="/metrics, /healthz and /readyz."),
    ] = None,
    secure_serving: Annotated[
        bool | None,
        typer.Option(
            "--secure-serving/--no-secure-serving", show_default="secure-serving", help="TLS for ext_proc."
        ),
    ] = None,
    cert_path: Annotated[
        Path | None,
        typer.Option("--cert-path", show_default="self-signed", help="Directory with tls.crt and tls.key."),
    ] = None,
    drain_timeout: Annotated[
        str | None,
        typer.Option("--drain-timeout", show_default="30s", help="How long requests may take to end."),
    ] = None,
    zap_encoder: Annotated[
        ZapEncoder | None, typer.Option("--zap-encoder", help="How a line of the log looks.")
    ] = None,
    verbosity: Annotated[
        int, typer.Option("-v", "--v", min=0, help=f"{DEBUG_FROM} and more log at DEBUG.")
    ] = 2,
) -> None:
    """Run the scheduler as the endpoint picker of an inference gateway, with the flags of llm-d's."""
    from ..config import ConfigError, load_config, parse_config
    from ..service import run as service
    from ..service.reload import ConfigFile

    if pool_group != POOL_GROUP:
        raise typer.BadParameter(f"only InferencePool v1 ({POOL_GROUP}) is read", param_hint="--pool-group")
    try:
        source = _source(pool_name, pool_namespace, endpoint_selector, endpoint_target_ports or [])
        given: dict[str, Any] = {
            "grpc_port": grpc_port,
            "grpc_health_port": grpc_health_port,
            "metrics_port": metrics_port,
            "drain_timeout": drain_timeout and read_duration("drain-timeout", drain_timeout),
            "log_format": zap_encoder and _log_format(zap_encoder).value,
        }
    except FlagError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{error.flag}") from None
    given = {key: value for key, value in given.items() if value is not None}
    if source is None and config is None:
        raise typer.BadParameter(
            "needed, or --endpoint-selector with --endpoint-target-ports, or a --config that names instances",
            param_hint="--pool-name",
        )
    tls = _tls(secure_serving, cert_path)

    def complete(raw: dict[str, Any]) -> dict[str, Any]:
        return _completed(raw, given, tls, source)

    try:
        if config is None:
            settings, file = parse_config(complete({}), "epp"), None
        else:
            settings = load_config(config, complete)
            file = ConfigFile(config, settings, lambda found: found, complete)
    except ConfigError as error:
        fail_with_2(str(error))
    level = LogLevel.DEBUG if verbosity >= DEBUG_FROM else LogLevel.INFO
    with logging_at(level, settings.log_format) as streams:
        for note in context.meta[_NOTES]:
            logging.getLogger(__name__).warning("%s", note)
        run(service.serve(settings, streams, file))


def _source(
    pool: str | None, namespace: str | None, selector: str | None, ports: list[str]
) -> dict[str, Any] | None:
    """Return the entry of ``discovery`` that the flags stand for; ``None`` if they name no instances."""
    found: dict[str, Any] = {"type": "kubernetes"}
    if namespace:
        found["namespace"] = namespace
    if pool and selector:
        raise FlagError("endpoint-selector", "not with --pool-name: give one of the two")
    if pool:
        return {**found, "pool": pool}
    if not selector:
        return None
    if not ports:
        raise FlagError("endpoint-target-ports", "needed with --endpoint-selector")
    return {**found, "selector": selector, "ports": read_ports("endpoint-target-ports", ports)}


def _log_format(encoder: ZapEncoder) -> LogFormat:
    return LogFormat.JSON if encoder is ZapEncoder.JSON else LogFormat.TEXT


def _tls(secure: bool | None, cert_path: Path | None) -> dict[str, Any] | None:
    """Return the value of ``grpc_tls`` that the flags stand for; empty if they say nothing of it."""
    if secure is False:
        return None
    if cert_path is not None:
        return {"cert": str(cert_path / "tls.crt"), "key": str(cert_path / "tls.key")}
    return {}


def _completed(
    raw: dict[str, Any], given: Mapping[str, Any], tls: dict[str, Any] | None, source: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a configuration with what a picker has by default, and with what the command line says."""
    host = _any_address()
    defaults: dict[str, Any] = {
        "grpc_host": host,
        "grpc_health_port": GRPC_HEALTH_PORT,
        "metrics_host": host,
        "metrics_port": METRICS_PORT,
        "admin_port": ADMIN_PORT,
        "grpc_tls": {"self_signed": True},
    }
    found = {**defaults, **raw, **given}
    if tls != {}:
        found["grpc_tls"] = tls
    discovery = found.get("discovery", [])
    if source is not None and isinstance(discovery, list):
        found["discovery"] = [*discovery, source]
    return found


def _any_address() -> str:
    """Return the address that stands for all of this machine: IPv6 and IPv4, where there is IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return "0.0.0.0"
    return "::"
