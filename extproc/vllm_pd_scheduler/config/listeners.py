"""Who listens where on this machine, and what two of them cannot have."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import urlsplit

from ..models import is_ip, join_address
from .instances import Listed
from .schema import SchedulerConfig

Listener = tuple[str, str, int]
"""The key or option that names it, host, port."""


def listeners_of(config: SchedulerConfig) -> list[Listener]:
    """Return where the scheduler listens, and Envoy's prefill listener if one on this machine is used."""
    listeners = [("admin_port", config.admin_host, config.admin_port)]
    if config.grpc_socket is None:
        listeners.insert(0, ("grpc_port", config.grpc_host, config.grpc_port))
    if config.grpc_health_port is not None:
        listeners.append(("grpc_health_port", config.grpc_host, config.grpc_health_port))
    if config.metrics_port is not None:
        listeners.append(("metrics_port", config.metrics_host, config.metrics_port))
    if config.metaserver_port is not None:
        listeners.append(("metaserver_port", config.metaserver_host, config.metaserver_port))
    if config.continuation_port is not None:
        listeners.append(("continuation_port", "127.0.0.1", config.continuation_port))
    prefill = urlsplit(config.prefill_listener or "")
    if prefill.hostname is not None and is_loopback(prefill.hostname):
        listeners.append(("prefill_listener", prefill.hostname, prefill.port or 80))
    return listeners


def is_loopback(host: str) -> bool:
    """Whether a listener bound to ``host`` can be reached from this machine only."""
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def clashes(listeners: Sequence[Listener], listed: Iterable[Listed]) -> Iterator[str]:
    """Yield a line for each two listeners at one address, and for each instance that is one of them."""
    for index, (name, host, port) in enumerate(listeners):
        for other, other_host, other_port in listeners[:index]:
            if port == other_port and _overlap(host, other_host):
                yield f"{name}: {join_address(host, port)} is where {other} listens already"
    for _, key, item in listed:
        for name, host, port in listeners:
            if port == item.port and is_loopback(item.host) and _overlap(host, item.host):
                yield f"{key}: {join_address(item.host, port)} is no instance, but our own {name}"


def _overlap(one: str, other: str) -> bool:
    return one == other or _is_any(one) or _is_any(other) or "localhost" in (one, other)


def _is_any(host: str) -> bool:
    return is_ip(host) and ipaddress.ip_address(host).is_unspecified
