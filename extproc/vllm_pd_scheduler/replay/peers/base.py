"""What the policies of other routers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...fleet.endpoint import Endpoint
from ...models import InstanceRole
from ...request.context import RequestContext
from ...sim.profile import EngineProfile
from ...strategies import Strategy
from ..cache_events import CacheEvents


@dataclass(frozen=True, slots=True)
class Site:
    """What a router is told of the fleet before the first request."""

    profile: EngineProfile
    """For thresholds that its makers have calibrated by measuring an instance."""
    events: CacheEvents | None = None
    """KV events of all instances; without them the index says what is cached."""


class Peer(Strategy):
    """A policy of another router. As with all strategies, each role has an object of its own."""

    reads_prefixes = True
    scrape_interval_s: ClassVar[float | None] = None
    """How often it reads the metrics of an instance; ``None``: it does not depend on them."""
    event_delay_s: ClassVar[float | None] = None
    """How late it hears of a cached or evicted block; ``None``: it does not listen, and has an index of what
    it has sent where."""
    decode_first: ClassVar[bool] = False
    """Whether it chooses D when a request comes, not when its prefill has ended."""
    site: Site | None = None

    def deployed(self, site: Site) -> None:
        """Learn of the fleet."""
        self.site = site

    def alone(self, decodes: Sequence[Endpoint], request: RequestContext) -> Endpoint | None:
        """Return the D that is to serve a request without a P, if one is. Asked of the object for D."""
        return None

    def cached_blocks(self, endpoint: Endpoint, request: RequestContext) -> int:
        """Return how many leading blocks of the prompt it takes for cached there."""
        if self.site is not None and self.site.events is not None and self.event_delay_s is not None:
            return self.site.events.cached_blocks(endpoint.id, request.blocks, request.now)
        return request.cached_blocks(endpoint.holder)

    def cached(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return how many tokens of the prompt it takes for cached there."""
        return min(request.prompt_tokens, self.cached_blocks(endpoint, request) * request.block_tokens)


def is_decode(endpoints: Sequence[Endpoint]) -> bool:
    """Whether D is to be chosen."""
    return endpoints[0].instance.role is InstanceRole.DECODE


class Pins:
    """On which D each conversation is."""

    def __init__(self) -> None:
        self._at: dict[str, str] = {}

    def find(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Endpoint | None:
        """Return the D of a request's conversation; ``None`` for its first turn, or if that D is away."""
        name = self._at.get(request.session or "")
        return next((each for each in endpoints if each.id == name), None)

    def pin(self, request: RequestContext, endpoint: Endpoint) -> None:
        """Remember where a conversation is."""
        if request.session is not None:
            self._at[request.session] = endpoint.id
