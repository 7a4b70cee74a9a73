"""Policies that several routers have alike."""

from __future__ import annotations

from collections.abc import Sequence

from ...fleet.endpoint import Endpoint
from ...models import InstanceRole
from ...request.context import RequestContext
from ...strategies import Strategy
from ...strategies.power_of_two import PowerOfTwo
from ...strategies.session import Session


class Random(Strategy):
    """``random`` of vllm-router, SGLang's router and smg: any endpoint."""

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return endpoints drawn at random."""
        return self.random.sample(endpoints, min(count, len(endpoints)))


class CacheAware(PowerOfTwo):
    """``cache_aware`` of SGLang's router, vllm-router and smg for prefill; ``power_of_two`` for decode.

    - While load is balanced: the endpoint with the longest cached prefix, if more than ``cache_threshold`` of
      the prompt is cached there; else the one with the emptiest cache.
    - While it is not, that is if the most requests of an endpoint exceed the fewest by more than
      ``balance_abs_threshold`` and by more than the factor ``balance_rel_threshold``: the fewest requests.

    Rules and defaults (0.3, 64, 1.5):
    https://github.com/lightseekorg/smg/blob/main/docs/concepts/routing/cache-aware.md
    """

    reads_prefixes = True
    cache_threshold = 0.3
    balance_abs_threshold = 64
    balance_rel_threshold = 1.5

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return one endpoint, chosen by cache or by load; for decode, as ``power_of_two``."""
        if endpoints[0].instance.role is InstanceRole.DECODE:
            return super().rank(endpoints, request, count)
        loads = [e.in_flight for e in endpoints]
        fewest, most = min(loads), max(loads)
        if most - fewest > self.balance_abs_threshold and most > self.balance_rel_threshold * fewest:
            return [endpoints[loads.index(fewest)]]
        depths = [request.cached.get(e.holder, 0) for e in endpoints]
        deepest = max(depths)
        if deepest * request.block_tokens > self.cache_threshold * request.prompt_tokens:
            return [endpoints[depths.index(deepest)]]
        return [min(endpoints, key=lambda e: len(e.holder))]


class ConsistentHash(Session):
    """``consistent_hash`` of vllm-router, ``consistent_hashing`` of smg: a session stays on its endpoint.

    It is our ``session`` without the bound on load. A trace names no sessions: the prompt's second block
    stands for one.
    """

    bound = None
