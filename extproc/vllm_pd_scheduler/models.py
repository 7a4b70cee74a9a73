"""The nouns that every other module speaks of: instances, their state and what was scraped of them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import StrEnum


class InstanceRole(StrEnum):
    """What an instance is there for. vLLM itself does not enforce it."""

    PREFILL = "prefill"
    DECODE = "decode"


class InstanceState(StrEnum):
    """What an instance can be used for at this moment."""

    STARTING = "starting"
    """Registered, not probed yet: takes no requests."""
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    """Finishes what it has, takes nothing new."""


@dataclass(frozen=True, slots=True)
class PDInstance:
    """One vLLM server: an id of the operator's choice, a role and where it listens.

    ``host`` is an IP address or a DNS name, without a scheme. ``api_key``, if the instance was started
    with ``--api-key``, is sent to it as a bearer token and never shown. ``tls_name`` makes it TLS: the DNS
    name that the instance's certificate must be for.
    """

    instance_id: str
    role: InstanceRole
    host: str
    port: int
    api_key: str | None = field(default=None, repr=False)
    tls_name: str | None = None

    @property
    def scheme(self) -> str:
        """Of its URLs: ``http`` or ``https``."""
        return "http" if self.tls_name is None else "https"

    @property
    def url(self) -> str:
        """Base URL, IPv6 addresses in brackets."""
        return f"{self.scheme}://{join_address(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """The part of one ``/metrics`` scrape that choosing an instance needs; ``engine`` series are summed.

    ``latency`` is the mean time in seconds of what matters for the role, over the requests that finished
    between this scrape and the one before (TTFT for prefill, time per output token for decode); ``None``
    until two scrapes have seen some.
    """

    taken_at: float
    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    latency: float | None = None
    kv_capacity: float | None = None
    """Tokens that its KV cache holds; ``None`` if it does not say."""
    step_time: float | None = None
    """Mean seconds between two tokens of a request since the scrape before; ``None`` if there were none."""
    output_tokens: float = 0.0
    """Tokens generated since the scrape before."""
    finished: float = 0.0
    """Requests that ended since the scrape before."""
    transfer: float | None = None
    """Mean seconds of the KV transfers since the scrape before."""


def join_address(host: str, port: int) -> str:
    """``host:port`` as URLs and Envoy write it: IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip(host: str) -> bool:
    """Whether ``host`` is an IP address rather than a name that must be resolved."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
