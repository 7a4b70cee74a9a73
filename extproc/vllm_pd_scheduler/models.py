"""The nouns that all rooms share: instances, their roles and states, and a scrape of their metrics."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import StrEnum

ANY_MODEL = "*"
"""Among an instance's configured models: it may serve any name, which its engine resolves."""

MAX_RANKS = 64
"""Data-parallel engines of one instance at most. Its ``/metrics`` has 50 KB of each."""

_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
_AFTER_IPV4_COMPATIBLE = ipaddress.IPv6Address("::1:0:0")


class InstanceRole(StrEnum):
    """What the fleet uses an instance for. vLLM itself serves any request on either."""

    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"
    """Encodes images, video and audio for P."""


PD_ROLES = (InstanceRole.PREFILL, InstanceRole.DECODE)
"""The roles between which requests are split. Strategies choose instances of these, and Envoy knows them."""


class InstanceState(StrEnum):
    """Whether an instance gets requests."""

    STARTING = "starting"
    """Registered and not probed yet: gets none."""
    HEALTHY = "healthy"
    """Gets requests."""
    UNHEALTHY = "unhealthy"
    """Its probes fail, or it was ejected because requests failed there: gets none."""
    DRAINING = "draining"
    """Finishes the requests that it has and gets no new ones, as an operator asked."""


class By(StrEnum):
    """Who causes a change, as logs and events name them."""

    START = "start"
    """The program itself: what it was configured with, or what a script does with the library."""
    PROBE = "probe"
    """A health check, and what an instance answered to it."""
    REQUEST = "request"
    """What became of clients' requests."""
    SIGNAL = "signal"
    """A signal to the process."""
    DISCOVERY = "discovery"
    """A source that tells of instances, or a watched file; its name follows."""
    ADMIN = "admin"
    """An operator at the admin interface; the client's address follows, where it is known."""
    ADVICE = "advice"
    """The scheduler itself, which turns an instance as [configured](ratio.md#by-itself)."""
    REPLICA = "replica"
    """Another replica of the scheduler, or the connection to those."""


@dataclass(frozen=True, slots=True)
class ConnectorChoice:
    """A KV hand-off protocol, and what is configured for it."""

    name: str
    """A built-in one's, an entry point's, or ``package.module:Class``."""
    settings: tuple[tuple[str, str | int | float | bool], ...] = ()
    """By their keys, in order."""


Place = tuple[InstanceRole, str, int]
"""Role, host and port: two instances that have these in common are one endpoint."""


@dataclass(frozen=True, slots=True)
class PDInstance:
    """One vLLM server of the fleet."""

    instance_id: str
    """Chosen by the operator; unique in the fleet."""
    role: InstanceRole
    host: str
    """IP address or DNS name, without a scheme."""
    port: int
    api_key: str | None = field(default=None, repr=False)
    """Its ``--api-key``: sent to it as a bearer token, and never shown."""
    tls_name: str | None = None
    """DNS name that its certificate must be for; ``None`` for plain HTTP."""
    models: frozenset[str] | None = None
    """Names that it serves, as configured; ``None``: what its ``/v1/models`` says. With :data:`ANY_MODEL`
    it also serves names that it does not list."""
    revision: str | None = None
    """Of a roll-out: P hands over only to D of the same one."""
    connector: ConnectorChoice | None = None
    """The protocol by which it hands over, of an encode instance that of its encodings; ``None``: that of the
    fleet."""
    data_parallel_size: int = 1
    """Engines behind its one port. With more than one, each is an endpoint of its own, a rank."""
    kv_events_ports: tuple[int | None, int | None] = None, None
    """Where it publishes KV events, and gives them again, if not where the fleet does."""

    def __post_init__(self) -> None:
        size = self.data_parallel_size
        if isinstance(size, bool) or not (isinstance(size, int) and 1 <= size <= MAX_RANKS):
            raise ValueError(
                f"data_parallel_size of {self.instance_id}: must be a whole number from 1 to {MAX_RANKS}, "
                f"not {size!r}"
            )
        object.__setattr__(self, "host", canonical_host(self.host))

    @property
    def place(self) -> Place:
        """What no two instances may share. A final dot makes no other name of its host."""
        return self.role, self.host.removesuffix("."), self.port

    @property
    def scheme(self) -> str:
        """Scheme of its URLs: ``http`` or ``https``."""
        return "http" if self.tls_name is None else "https"

    @property
    def url(self) -> str:
        """Base URL, with an IPv6 address in brackets."""
        return f"{self.scheme}://{join_address(self.host, self.port)}"

    @property
    def authorization(self) -> dict[str, str]:
        """The header that has its key; empty if it asks for none."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """The part of one scrape of ``/metrics`` that scheduling needs.

    If an instance has several engines (data parallelism), counts are summed over them. Means and differences
    are over the time since the scrape before, and ``None`` or 0 if there was none.
    """

    taken_at: float
    """Monotonic seconds."""
    running: float = 0.0
    """Requests that are in a batch."""
    waiting: float = 0.0
    """Requests that are queued there."""
    kv_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1."""
    latency: float | None = None
    """Mean seconds to the first token (prefill) or per output token (decode), of requests that finished."""
    kv_capacity: float | None = None
    """Tokens that the KV cache holds; ``None`` if the instance does not say."""
    step_time: float | None = None
    """Mean seconds between two tokens of a request; ``None`` if there were none."""
    output_tokens: float = 0.0
    """Tokens generated."""
    finished: float = 0.0
    """Requests that ended."""
    transfer: float | None = None
    """Mean seconds of the KV transfers; ``None`` if there were none."""
    transfer_rate: float | None = None
    """Bytes of the KV transfers by the seconds that they took together; ``None`` if there were none."""
    failed_transfers: float | None = None
    """KV transfers that have failed; ``None`` if it does not count them."""
    latency_at: float | None = None
    """When ``latency`` was measured. It is forgotten when that is long ago and no further request ends."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters of requests that run or wait there, those that run last."""
    adapter_slots: int = 0
    """LoRA adapters that it holds at once (``--max-loras``); 0 if it has not said."""


def join_address(host: str, port: int) -> str:
    """Return ``host:port`` as in URLs and for Envoy: an IPv6 address is put in brackets."""
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
