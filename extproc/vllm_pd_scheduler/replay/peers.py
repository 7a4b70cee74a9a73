"""Policies of other routers, written from their documentation, to compare with in a replay.

They use our prefix index, which knows the real size of each KV cache, and so are better off than with their
own.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..request.context import RequestContext
from ..strategies import Strategy
from ..strategies.power_of_two import PowerOfTwo
from ..strategies.session import Session


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


class LlmD(Strategy):
    """llm-d's weighted scorers: the highest sum of queue + KV cache + 3 * prefix wins.

    - *queue* = (most waiting - waiting) / (most waiting - fewest waiting); 1 if all are equal.
    - *KV cache* = 1 - usage.
    - *prefix* = cached blocks / blocks of the prompt.

    Waiting requests and usage are as scraped, every 50 ms. Equal sums are decided at random. Scorers:
    https://llm-d.ai/docs/architecture/core/router/epp/scheduling. Weights: the default profile of the quick
    start.
    """

    reads_prefixes = True

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return the endpoints with the highest sums."""
        waiting = [e.metrics.waiting if e.metrics else 0.0 for e in endpoints]
        most, fewest = max(waiting), min(waiting)
        scored = []
        for endpoint, queued in zip(endpoints, waiting, strict=True):
            queue = (most - queued) / (most - fewest) if most > fewest else 1.0
            depth = request.cached.get(endpoint.holder, 0)
            prefix = depth / len(request.blocks) if request.blocks else 0.0
            scored.append((queue + (1 - endpoint.kv_usage) + 3 * prefix, self.random.random(), endpoint))
        scored.sort(key=lambda one: one[:2], reverse=True)
        return [endpoint for _, _, endpoint in scored[:count]]


class ConsistentHash(Session):
    """``consistent_hash`` of vllm-router, ``consistent_hashing`` of smg: a session stays on its endpoint.

    It is our ``session`` without the bound on load. A trace names no sessions: the prompt's second block
    stands for one.
    """

    bound = None


class Dynamo(Strategy):
    """NVIDIA Dynamo's KV router: the least cost = prefill blocks + active decode blocks.

    - On P: the uncached tokens that are queued there, plus those of this request.
    - On D: the tokens of the requests there.

    Source: https://docs.nvidia.com/dynamo/dev/components/router/routing-concepts
    """

    reads_prefixes = True

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the cost in tokens."""
        if endpoint.instance.role is InstanceRole.DECODE:
            return endpoint.tokens
        cached = request.cached.get(endpoint.holder, 0) * request.block_tokens
        return endpoint.tokens + request.prompt_tokens - cached


PEERS: dict[str, type[Strategy]] = {
    "random": Random,
    "cache_aware": CacheAware,
    "llm_d": LlmD,
    "consistent_hash": ConsistentHash,
    "dynamo": Dynamo,
}
