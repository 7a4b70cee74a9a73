"""What a whole decision costs for a prompt of 100,000 tokens: whether it is split, its P, and its D.

Hashing the prompt is no part of it. ``each``: every instance has another depth of the prompt cached.
``ROUNDS`` of each are measured.
"""

import itertools
import os
import random
from typing import Any

import pytest

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.scheduler.disaggregation import Disaggregation

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
BLOCKS = 400
"""Of 250 tokens."""
SHARED = 8
"""Blocks that all instances have: a system prompt."""
OTHERS = 3
"""Prompts of others that each instance has cached."""
HAND_OFFS = 8192
"""That were learned from, so that D is chosen by its link from the P too."""
ROUNDS = int(os.environ.get("ROUNDS", "300"))

draw = random.Random(1)


def chain(start: tuple[int, ...] = ()) -> tuple[int, ...]:
    return start + tuple([draw.getrandbits(60) for _ in range(BLOCKS - len(start))])


def fleet(size: int, each: bool, blocks: tuple[int, ...]) -> Registry:
    """A busy fleet with other prompts in its caches, and of this one what all have or each another part."""
    registry = Registry()
    depths = itertools.cycle(random.Random(2).sample(range(SHARED, BLOCKS), 2 * 64))
    for role in PD_ROLES:
        for number in range(size):
            host = f"10.{1 + (role is D)}.{number >> 8}.{number & 255}"
            endpoint = registry.add(PDInstance(f"{role}-{number}", role, host, 8000))
            registry.probed(endpoint, None)
            for _ in range(OTHERS):
                endpoint.holder.store(chain(blocks[:SHARED]))
            if each:
                endpoint.holder.store(blocks[: next(depths)])
            for _ in range(draw.randrange(4)):
                prompt = RequestContext("/", prompt_tokens=draw.randrange(1, 9000), output_tokens=200.0)
                registry.work.reserve(endpoint, prompt)
            metrics = MetricsSnapshot(0.0, 3.0, draw.random(), 0.1, 0.3)
            registry.scraped(endpoint, metrics, endpoint.in_flight, endpoint.tokens)
    for number in range(HAND_OFFS):
        seconds = draw.uniform(0.01, 0.05)
        registry.load.transfers.learn(f"{P}-{number % size}", f"{D}-{draw.randrange(size)}", 4000.0, seconds)
    return registry


@pytest.mark.parametrize("setting", ["always", "auto", "tpot"])
@pytest.mark.parametrize("depths", ["shared", "each"])
@pytest.mark.parametrize("size", [64, 1000], ids="{}-of-a-role".format)
def test_decision(benchmark: Any, size: int, depths: str, setting: Any) -> None:
    """As the router decides, with three more D that Envoy may try."""
    blocks = chain()
    registry = fleet(size, depths == "each", blocks)
    config = SchedulerConfig(strategy="predicted_latency", disaggregation=setting)
    scheduler = Scheduler(config, registry, seed=1)
    disaggregation = Disaggregation(config, scheduler)
    numbers = itertools.count(1)

    def setup() -> tuple[tuple[RequestContext], dict[str, Any]]:
        now = next(numbers) / 100
        request = RequestContext(
            "/v1/completions", prompt_tokens=100_000.0, output_tokens=200.0, blocks=blocks,
            block_tokens=250.0, arrived=now, now=now,
        )  # fmt: skip
        return (request,), {}

    def decide(request: RequestContext) -> int:
        if disaggregation.local_endpoint(request) is not None:
            return 1
        (prefill,) = scheduler.pick(P, request)
        claim = registry.work.reserve(prefill, request, tentative=True)
        decode = scheduler.pick(D, request, count=4, beside=prefill)
        claim.release()
        return len(decode)

    assert benchmark.pedantic(decide, setup=setup, rounds=ROUNDS, warmup_rounds=20)
