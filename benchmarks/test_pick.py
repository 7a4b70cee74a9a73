"""What a pick costs: the scheduler's choice for a prompt of 25 blocks, the prefix index being full."""

import random
from typing import Any

import pytest

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler

NAMES = (
    "round_robin", "least_load", "weighted", "power_of_two",
    "prefix_cache", "session", "predicted_latency", "slo",
)  # fmt: skip
BLOCKS = 25
SHARED = 8
"""Blocks that all instances have: a system prompt."""
KEPT = 2000
"""Blocks that each instance keeps."""

draw = random.Random(1)


def chain(length: int, start: tuple[int, ...] = ()) -> tuple[int, ...]:
    return start + tuple([draw.getrandbits(60) for _ in range(length - len(start))])


@pytest.fixture(scope="module", params=[16, 1000], ids="{}-instances".format)
def fleet(request: pytest.FixtureRequest) -> tuple[Registry, RequestContext]:
    """A busy fleet: every instance scraped, with requests of ours and a full cache."""
    registry, start = Registry(), chain(SHARED)
    for role in InstanceRole:
        for number in range(request.param):
            host = f"10.0.{number >> 8}.{number & 255}"
            endpoint = registry.add(PDInstance(f"{role}-{number}", role, host, 8000))
            registry.probed(endpoint, None)
            endpoint.holder.resize(KEPT)
            for _ in range(KEPT // 400 + 1):
                endpoint.holder.store(chain(400, start))
            for _ in range(draw.randrange(4)):
                prompt = RequestContext("/", prompt_tokens=draw.randrange(1, 9000), output_tokens=200.0)
                registry.reserve(endpoint, prompt)
            metrics = MetricsSnapshot(0.0, 3.0, draw.random(), 0.1, 0.3, 1e6)
            endpoint.metrics, endpoint.kv_capacity = metrics, metrics.kv_capacity
    blocks = chain(BLOCKS, start)
    next(iter(registry)).holder.store(blocks)
    asked = RequestContext(
        "/v1/completions", prompt_tokens=6400.0, output_tokens=200.0, blocks=blocks, block_tokens=256.0,
        session="somebody", ttft_slo=1.0, tpot_slo=0.03, now=0.01,
    )  # fmt: skip
    return registry, asked


@pytest.mark.parametrize("role", list(InstanceRole), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_pick(benchmark: Any, fleet: tuple[Registry, RequestContext], name: str, role: InstanceRole) -> None:
    """As the router picks: one P, but a D with three more that Envoy may try."""
    registry, asked = fleet
    scheduler = Scheduler(SchedulerConfig(strategy=name), registry, seed=1)
    count = 1 if role is InstanceRole.PREFILL else 4
    assert len(benchmark(scheduler.pick, role, asked, count=count)) == count
