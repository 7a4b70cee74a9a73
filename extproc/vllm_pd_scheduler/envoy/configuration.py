"""The configuration of an Envoy: ``envoy.yaml`` with the ports and settings that were asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config.tls import InstanceTlsConfig, TlsConfig
from ..request.api import APIS
from ..request.path import PUBLIC_PATHS, SPLIT_PATHS, PublicPaths, path_regex
from .ports import EnvoyPorts
from .schedulers import SchedulerAddress, put_schedulers

_CONTINUATION_CHECK = {
    "timeout": "2s",
    "interval": "0.5s",
    "no_traffic_interval": "0.5s",
    "unhealthy_threshold": 1,
    "healthy_threshold": 1,
    "http_health_check": {"path": "/continuation/health"},
}
"""How a scheduler that hangs is found by those whose streams shall go on."""

WEBSOCKET_PATH = "/v1/realtime"
"""The path of ``envoy.yaml``'s route for WebSockets."""


def config_path() -> Path:
    """Return the path of ``envoy.yaml``: in the installed package, or in the source tree."""
    packaged = Path(__file__).with_name("envoy.yaml")
    return packaged if packaged.exists() else Path(__file__).parents[3] / "envoy" / "envoy.yaml"


def render_config(
    ports: EnvoyPorts,
    tls: InstanceTlsConfig | None = None,
    stream_idle_timeout: float | None = None,
    max_retries: int | None = None,
    public_paths: Sequence[str] = PUBLIC_PATHS,
    schedulers: Sequence[SchedulerAddress] = (),
    scheduler_tls: TlsConfig | None = None,
) -> dict[str, Any]:
    """Return ``envoy.yaml`` as a dict with these settings in place of its own.

    ``tls`` is that to the instances, ``stream_idle_timeout`` the longest pause of a stream in seconds, and
    ``max_retries`` how many further instances a request is sent to. ``schedulers`` are in place of the one of
    ``ports``, and ``scheduler_tls`` is their ``grpc_tls``; raise :exc:`ValueError` if they cannot be.
    """
    config: dict[str, Any] = yaml.safe_load(config_path().read_text(encoding="utf-8"))
    for policy in _retry_policies(config):
        if max_retries is not None:
            policy["num_retries"] = max_retries
    if stream_idle_timeout is not None:
        _limit_pauses(_ingress_routes(config), stream_idle_timeout)
    _make_public(_ingress_routes(config), public_paths)
    _continue(config, ports)
    config["admin"]["address"]["socket_address"]["port_value"] = ports.admin
    listeners = config["static_resources"]["listeners"]
    if ports.prefill is None:
        listeners[:] = [each for each in listeners if each["name"] != "prefill"]
    for listener in listeners:
        address = listener["address"]["socket_address"]
        address["port_value"] = {"ingress": ports.ingress, "prefill": ports.prefill}[listener["name"]]
        if listener["name"] == "ingress" and ports.address is not None:
            address["address"] = ports.address
            address |= {"ipv4_compat": True} if ports.address == "::" else {}
    if tls is not None:
        for cluster in config["static_resources"]["clusters"]:
            for match in cluster.get("transport_socket_matches", ()):
                match["transport_socket"]["typed_config"] = _upstream_tls(tls)
    near = [SchedulerAddress(ports.grpc_socket or f"127.0.0.1:{ports.grpc}")]
    put_schedulers(config, schedulers or near, scheduler_tls)
    if sys.platform != "linux":  # the numbers of these options are Linux's
        for each in (*config["static_resources"]["listeners"], *config["static_resources"]["clusters"]):
            each.pop("socket_options", None)
            each.pop("upstream_bind_config", None)
    return config


def _continue(config: dict[str, Any], ports: EnvoyPorts) -> None:
    """Have streams go on at another D by way of the scheduler's port, if it has one for that."""
    clusters = config["static_resources"]["clusters"]
    (found,) = (each for each in clusters if each["name"] == "continuation")
    if ports.continuation is None:
        clusters.remove(found)
        routes = _ingress_routes(config)
        routes[:] = [route for route in routes if route.get("name") != "continuation"]
        return
    if ports.continues:
        found["health_checks"] = [_CONTINUATION_CHECK]
    schedulers, ingress = found["load_assignment"]["endpoints"]
    every = range(ports.continuation, ports.continuation + max(1, ports.continues))
    schedulers["lb_endpoints"] = [_endpoint("127.0.0.1", port) for port in every]
    if len(every) > 1:
        # As long as one worker is healthy, no stream goes on without any.
        found["load_assignment"]["policy"] = {"overprovisioning_factor": 100 * len(every)}
    (own,) = ingress["lb_endpoints"]
    own["endpoint"] |= _endpoint(ports.ingress_address, ports.ingress)["endpoint"]


def _endpoint(host: str, port: int) -> dict[str, Any]:
    return {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}}


def num_retries() -> int:
    """Return how many further decode instances an Envoy on ``envoy.yaml`` as it is tries."""
    config = yaml.safe_load(config_path().read_text(encoding="utf-8"))
    return min(int(policy["num_retries"]) for policy in _retry_policies(config))


def _retry_policies(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for listener in config["static_resources"]["listeners"]:
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        for host in manager["route_config"]["virtual_hosts"]:
            for route in host["routes"]:
                policy = route.get("route", {}).get("retry_policy")
                if policy is not None:
                    yield policy


def _limit_pauses(routes: list[dict[str, Any]], seconds: float) -> None:
    """Limit the pauses of streams: those that an attempt may have, and those after its first byte."""
    for action in (route.get("route", {}) for route in routes):
        if "per_try_idle_timeout" in action.get("retry_policy", {}):
            action["retry_policy"]["per_try_idle_timeout"] = f"{seconds:g}s"
            action["idle_timeout"] = f"{seconds + 1:g}s"


def _make_public(routes: list[dict[str, Any]], paths: Sequence[str]) -> None:
    """Put a route for each of these paths where those of ``envoy.yaml`` are."""
    given = [route for route in routes if route.get("name") == "public"]
    at = routes.index(given[0])
    routes[at : at + len(given)] = [{**given[0], "match": _path_match(path)} for path in paths]
    split = "|".join((*SPLIT_PATHS, *(path for path in paths if path in APIS)))
    for route in routes:
        if route.get("name") == "split":
            route["match"]["safe_regex"]["regex"] = split
    if WEBSOCKET_PATH not in PublicPaths(paths):
        routes[:] = [route for route in routes if route.get("name") != "websocket"]


def _path_match(path: str) -> dict[str, Any]:
    return {"safe_regex": {"regex": path_regex(path)}} if "*" in path else {"path": path}


def _ingress_routes(config: dict[str, Any]) -> list[dict[str, Any]]:
    (ingress,) = (each for each in config["static_resources"]["listeners"] if each["name"] == "ingress")
    manager = ingress["filter_chains"][0]["filters"][0]["typed_config"]
    routes: list[dict[str, Any]] = manager["route_config"]["virtual_hosts"][0]["routes"]
    return routes


def _upstream_tls(tls: InstanceTlsConfig) -> dict[str, Any]:
    common: dict[str, Any] = {"validation_context": {"trusted_ca": {"filename": tls.ca_file()}}}
    if tls.cert is not None:
        files = {"certificate_chain": {"filename": tls.cert}, "private_key": {"filename": tls.key}}
        common["tls_certificates"] = [files]
    return {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "auto_host_sni": True,  # the name comes with the instance, by EDS
        "auto_sni_san_validation": True,
        "common_tls_context": common,
    }
