"""AIBrix 0.8: its ``pd`` router, with all instances in one roleset."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from ...fleet.endpoint import Endpoint
from ...request.context import RequestContext
from .base import Peer, is_decode


class Aibrix(Peer):
    """The policies that are its defaults, ``prefix_cache`` for P and ``load_balancing`` for D.

    P:

    - While one has more than ``spread`` requests more than another: the one with the fewest.
    - Else, among those with at most mean + standard deviation of the requests, the least
      (100 - cached percent) / 10 + requests / most requests.

    D, by requests there, tokens a second (running requests / time per token) and free KV cache:

    - While one has ``spread`` requests more than another: the one with the fewest.
    - While one makes ``throughput_spread`` tokens a second more than another: the one that makes the fewest.
    - Else the least (requests / most + 1 - throughput / highest) / (free / most free).

    Metrics are read every 50 ms, and both are chosen when a request comes. Which prefix is where is known by
    what was sent there. Its third check of D, by how fast each drains, is left out: it needs a metric that
    the simulated engines do not have.

    vllm-project/aibrix, ``pkg/plugins/gateway/algorithms``: ``pd_readme.md``, ``pd/prefill_scorer.go`` and
    ``pd/decode_scorer.go`` say what the defaults are.
    """

    scrape_interval_s = 0.05
    decode_first = True
    spread = 16
    throughput_spread = 2048.0

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return the endpoints with the least scores; equal ones at random."""
        scores = self._decode(endpoints) if is_decode(endpoints) else self._prefill(endpoints, request)
        return sorted(scores, key=lambda each: (scores[each], self.random.random()))[:count]

    def _prefill(self, endpoints: Sequence[Endpoint], request: RequestContext) -> dict[Endpoint, float]:
        requests = {each: float(each.in_flight) for each in endpoints}
        fewest, most = min(requests.values()), max(requests.values())
        if most - fewest > self.spread:
            return requests
        limit = fmean(requests.values()) + pstdev(requests.values())
        prompt = max(1.0, request.prompt_tokens)
        return {
            each: 10.0 * (1.0 - self.cached(each, request) / prompt) + number / max(1.0, most)
            for each, number in requests.items()
            if number <= limit
        }

    def _decode(self, endpoints: Sequence[Endpoint]) -> dict[Endpoint, float]:
        requests = {each: each.requests for each in endpoints}
        if max(requests.values()) - min(requests.values()) >= self.spread:
            return requests
        speed = {each: _throughput(each) for each in endpoints}
        if max(speed.values()) - min(speed.values()) > self.throughput_spread:
            return speed
        free = {each: max(0.001, 1.0 - each.kv_usage) for each in endpoints}
        most, fastest = max(1.0, *requests.values()), max(1.0, *speed.values())
        most_free = max(free.values())
        return {
            each: (requests[each] / most + 1.0 - speed[each] / fastest) / (free[each] / most_free)
            for each in endpoints
        }


def _throughput(endpoint: Endpoint) -> float:
    """Return the tokens that it makes a second, as it says."""
    metrics = endpoint.metrics
    return metrics.running / metrics.step_time if metrics is not None and metrics.step_time else 0.0
