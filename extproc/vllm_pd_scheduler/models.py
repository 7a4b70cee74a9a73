"""The nouns that every other module speaks of: instances, their state and what was scraped of them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import StrEnum

_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
_AFTER_IPV4_COMPATIBLE = ipaddress.IPv6Address("::1:0:0")


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
    EJECTED = "ejected"
    """Alive, but requests to it failed: takes none until its pause is over, unless there is no other."""
    DRAINING = "draining"
    """Finishes what it has, takes nothing new."""


@dataclass(frozen=True, slots=True)
class PDInstance:
    """One vLLM server: an id of the operator's choice, a role and where it listens.

    ``host`` is an IP address or a DNS name, without a scheme; it is kept as :func:`canonical_host` spells it.
    ``api_key``, if the instance was started with ``--api-key``, is sent to it as a bearer token and never
    shown. ``tls_name`` makes it TLS: the DNS name that the instance's certificate must be for.
    """

    instance_id: str
    role: InstanceRole
    host: str
    port: int
    api_key: str | None = field(default=None, repr=False)
    tls_name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", canonical_host(self.host))

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
    between two scrapes (TTFT for prefill, time per output token for decode), and ``latency_at`` when the
    later of the two was taken; ``None`` until two scrapes have seen some, and when that is long ago.
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
    latency_at: float | None = None


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


def canonical_host(host: str) -> str:
    """Return a host in its one spelling: an address as Envoy writes it, anything else in lower case.

    A name keeps its final dot, without which a resolver would try its search domains first.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    return canonical_ip(bare) or host.lower()


def canonical_ip(text: str) -> str | None:
    """Return an IP address as Envoy writes it; ``None`` if ``text`` is no address that one server has.

    Envoy compares addresses as text. An IPv4 address in IPv6 (``::ffff:10.0.0.1``) is the IPv4 address. One
    with a zone means another server on each machine, and one that is unspecified, multicast, broadcast or
    of the abandoned ``::/96`` none.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return None
        address = address.ipv4_mapped or address
    if address.is_unspecified or address.is_multicast or address == _BROADCAST:
        return None
    if address.version == 6 and address < _AFTER_IPV4_COMPATIBLE and not address.is_loopback:
        return None
    return str(address)
