"""A router that has served requests for some minutes, and has learned what they take."""

from collections.abc import Sequence
from random import Random
from typing import Any

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.records.traffic import Recorded
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.router import PDRouter

OVERHEAD, PER_TOKEN = 0.005, 1e-4
"""Seconds of a prefill, and of each of its tokens."""
BASE, PER_SEQ, PER_KV_TOKEN = 0.015, 2e-4, 2e-8
"""Seconds of a decode step, of each request in it, and of each token of their contexts."""


class Traffic:
    """Requests at random times, of random lengths: a mean of ``prompt`` and ``answer`` tokens."""

    def __init__(self, per_second: float, prompt: float, answer: float, seed: int = 0) -> None:
        self._random = Random(seed)
        self.per_second, self.prompt, self.answer = per_second, prompt, answer

    def requests(self, count: int, start: float = 0.0) -> list[Recorded]:
        """Return so many of them."""
        found, now = [], start
        for _ in range(count):
            now += self._random.expovariate(self.per_second)
            prompt = 16 + self._random.expovariate(1 / self.prompt)
            answer = 1 + int(self._random.expovariate(1 / self.answer))
            found.append(Recorded(now, prompt, True, output_tokens=answer, ttft=0.5))
        return found


def served(requests: Sequence[Recorded], prefill: int = 4, decode: int = 4, **config: Any) -> PDRouter:
    """Return a router of such a fleet that has sent these requests to D."""
    clock = requests[-1].arrived + 1.0 if requests else 1.0
    router = PDRouter(SchedulerConfig(**config), clock=lambda: clock)
    for role, count in ((InstanceRole.PREFILL, prefill), (InstanceRole.DECODE, decode)):
        for number in range(count):
            router.register_instance(PDInstance(f"{role}-{number}", role, f"10.0.0.{number + 1}", 8000))
            endpoint = router.registry.get(f"{role}-{number}")
            router.registry.probed(endpoint, None)
    have_served(router, requests)
    return router


def have_served(router: PDRouter, requests: Sequence[Recorded]) -> None:
    """Have a router learn what its instances take, and send these requests to D."""
    for role in (InstanceRole.PREFILL, InstanceRole.DECODE):
        for endpoint in router.registry.endpoints(role):
            _learn(router, endpoint)
    for request in requests:
        router.recording.traffic.add(request)


def _learn(router: PDRouter, endpoint: Endpoint) -> None:
    registry, chance = router.registry, Random(endpoint.id)
    if endpoint.instance.role is InstanceRole.PREFILL:
        for _ in range(60):
            tokens = chance.randint(100, 8000)
            claim = registry.work.reserve(endpoint, RequestContext("/", prompt_tokens=tokens))
            registry.work.prefilled(claim, tokens, 0, OVERHEAD + PER_TOKEN * tokens)
        return
    for _ in range(40):
        running, kv = chance.randint(1, 60), chance.uniform(0.0, 0.6)
        step = BASE + PER_SEQ * running + PER_KV_TOKEN * kv * 1e6
        for _ in range(2):  # what runs at both ends of the time that a scrape is of
            seen = MetricsSnapshot(0.0, running, 0.0, kv, kv_capacity=1e6, step_time=step)
            registry.scraped(endpoint, seen, 0)
    registry.scraped(endpoint, MetricsSnapshot(0.0, kv_capacity=1e6), 0)
