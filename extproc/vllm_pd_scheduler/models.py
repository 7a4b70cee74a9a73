"""The nouns that every other module speaks of: instances, their state, what was scraped, what was asked."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .prefix import Holder, PrefixIndex


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


@dataclass(slots=True, eq=False)
class RequestContext:
    """What a strategy may know of a request. Never its text.

    ``now`` is set, and ``cached`` looked up, anew for each pick. ``blocks`` are chained hashes of the
    prompt's leading blocks, ``block_tokens`` tokens each, and empty if no strategy in use reads them.
    """

    path: str
    model: str | None = None
    body_bytes: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    prompt_bytes: int = 0
    """Size of the prompt, of which its length in tokens is estimated; 0 if that is exact."""
    prompt_tokens: float = 0.0
    """Length of the prompt: estimated from its bytes, exact once prefill has read it."""
    output_tokens: float = 0.0
    """Expected length of the answer."""
    blocks: Sequence[int] = ()
    block_tokens: float = 0.0
    priority: int = 0
    """Higher is served first when requests have to wait."""
    tenant: str = ""
    """Whom a request counts for when those who wait are served in turn."""
    session: str | None = None
    """What the requests of one conversation have in common."""
    ttft_slo: float | None = None
    """Seconds to the first token that the client asks for."""
    tpot_slo: float | None = None
    """Seconds for each further token that the client asks for."""
    arrived: float = 0.0
    now: float = 0.0
    """Time of this pick, monotonic seconds."""
    _index: PrefixIndex | None = field(default=None, init=False, repr=False)
    _cached: Mapping[Holder, int] | None = field(default=None, init=False, repr=False)

    @property
    def cached(self) -> Mapping[Holder, int]:
        """Leading blocks that are taken for cached, by ``Endpoint.holder``.

        Looked up when first read after a pick began: with 1,000 holders that takes 70 µs, which a pick that
        does not read it need not pay.
        """
        if self._cached is None:
            self._cached = self._index.match(self.blocks) if self._index is not None else {}
        return self._cached

    @cached.setter
    def cached(self, found: Mapping[Holder, int]) -> None:
        self._cached = found

    def look_up_in(self, index: PrefixIndex) -> None:
        """Forget what was cached, and look it up in ``index`` when it is read."""
        self._index, self._cached = index, None

    def uncached(self, holder: Holder, trust: float = 1.0) -> float:
        """Tokens of the prompt to compute where ``holder`` is; ``trust``: share of the cached that count."""
        cached = self.cached.get(holder, 0) * self.block_tokens
        return max(1.0, self.prompt_tokens - trust * cached)


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
