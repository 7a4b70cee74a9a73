"""llm-d: its default of today, and the one before."""

from __future__ import annotations

from collections.abc import Sequence

from ...fleet.endpoint import Endpoint
from ...request.context import RequestContext
from ...sim.profile import EngineProfile
from .base import Peer, Site, is_decode

_CHUNK = 8192
"""Tokens of the chunk by which its makers measure an instance's prefill throughput."""


class LlmD(Peer):
    """llm-d's default since v0.9, "sticky until saturated".

    - P: those that have at least ``affinity`` of the prompt cached, if there are any; of these, or else of
      all, the one with the fewest uncached tokens in flight, those of this request included.
    - Stickiness ends while the least backlog of those that have the prefix is ``max_penalty_s`` longer than
      the least of the others. A backlog is estimated as tokens in flight / throughput of an instance that
      reads one chunk of 8,192 tokens: the guide has it measured for each deployment, so it is here.
    - D: the fewest active requests.
    - Both are chosen when a request comes: the sidecar at D asks P. So D has the request in its count while
      P reads the prompt.
    - Which prefix is where is known by what was sent there (``approx-prefix-cache-producer``, the default).
      No metrics are read.

    Equal ones are decided at random. Defaults (0.8, 18 s) and rules: llm-d-router,
    ``pkg/epp/framework/plugins``: ``scheduling/filter/prefixcacheaffinity``, ``scheduling/scorer/tokenload``,
    ``scheduling/scorer/activerequest``, ``requestcontrol/dataproducer/inflightload``, each with a README; and
    the llm-d blog of 2026-08-17.
    """

    decode_first = True
    affinity = 0.8
    max_penalty_s = 18.0
    throughput = 15_928.0
    """Tokens a second, llm-d's own default, until the fleet is known."""

    def deployed(self, site: Site) -> None:
        """Calibrate the throughput."""
        super().deployed(site)
        self.throughput = peak_throughput(site.profile)

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return the endpoints with the least load, of those that it sticks to."""
        if is_decode(endpoints):
            return self._least({each: float(each.in_flight) for each in endpoints}, count)
        cached = {each: self.cached_blocks(each, request) for each in endpoints}
        needed = self.affinity * len(request.blocks) if request.blocks else float("inf")
        sticky = [each for each, blocks in cached.items() if blocks >= needed]
        others = [each for each, blocks in cached.items() if blocks < needed]
        if sticky and others:
            ahead = min(e.tokens for e in sticky) - min(e.tokens for e in others)
            if ahead / self.throughput > self.max_penalty_s:
                sticky = []
        load = {
            each: each.tokens + request.prompt_tokens - cached[each] * request.block_tokens
            for each in sticky or endpoints
        }
        return self._least(load, count)

    def _least(self, loads: dict[Endpoint, float], count: int) -> list[Endpoint]:
        return sorted(loads, key=lambda each: (loads[each], self.random.random()))[:count]


def peak_throughput(profile: EngineProfile) -> float:
    """Return the prompt tokens a second of an instance that has nothing else to do."""
    chunk = min(_CHUNK, profile.max_num_batched_tokens)
    return chunk / profile.step_time(chunk, 0, 0, chunk * chunk / 2)


class LlmDWeighted(Peer):
    """llm-d's weighted scorers, its default until July 2026: the highest queue + KV cache + 3 * prefix.

    - *queue* = (most waiting - waiting) / (most waiting - fewest waiting); 1 if all are equal.
    - *KV cache* = 1 - usage.
    - *prefix* = cached blocks / blocks of the prompt.

    Waiting requests and usage are as scraped, every 50 ms. Equal sums are decided at random. Scorers:
    https://llm-d.ai/docs/architecture/core/router/epp/scheduling. Weights: the default profile of the quick
    start.
    """

    scrape_interval_s = 0.05

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
