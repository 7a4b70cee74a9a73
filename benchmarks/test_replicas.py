"""What a request costs the replicas of a scheduler: the one that has it, and each that hears of it.

``ROUNDS`` messages of each kind are measured.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.replicas import FleetKey, Replica
from vllm_pd_scheduler.request.context import RequestContext

KEY = FleetKey("benchmark")
BATCH = 5
"""Requests in a message: 500 a second, told each 10 ms."""
ROUNDS = int(os.environ.get("ROUNDS", "2000"))


def fleet(instances: int) -> Registry:
    """A registry with so many healthy instances of each role."""
    registry = Registry()
    for role in PD_ROLES:
        for number in range(instances):
            host = f"10.{int(role is InstanceRole.DECODE)}.{number >> 8}.{number & 255}"
            registry.probed(registry.add(PDInstance(f"{role}-{number}", role, host, 8000)), None)
    for endpoint in registry:
        registry.scraped(endpoint, MetricsSnapshot(0.0, 20.0, 0.0, 0.5, kv_capacity=1e6), 0)
    return registry


class Load:
    """A replica that serves: each batch begins some requests, and moves those of before on."""

    def __init__(self, registry: Registry, blocks: int) -> None:
        self.registry, self.blocks, self.now = registry, blocks, 0.0
        self.replica = Replica(registry, "a", KEY)
        self.prefill = registry.endpoints(InstanceRole.PREFILL)
        self.decode = registry.endpoints(InstanceRole.DECODE)
        self.numbers = itertools.count()
        self.prefills: list[Any] = []
        self.decodes: list[Any] = []

    def work(self) -> None:
        """End the prefills of the batch before, begin their answers, end those of before; begin new ones."""
        self.now += 0.01
        for claim in self.decodes:
            claim.release(self.now)
        self.decodes = []
        for context, claim in self.prefills:
            self.registry.work.prefilled(claim, 2000, 0, self.now)
            decode = self.decode[next(self.numbers) % len(self.decode)]
            self.decodes.append(self.registry.work.reserve(decode, context))
        self.prefills = []
        for _ in range(BATCH):
            number = next(self.numbers)
            context = RequestContext(
                "/v1/completions",
                prompt_tokens=2000.0,
                output_tokens=200.0,
                blocks=tuple(
                    (number * 1000 + n) * 0x9E3779B97F4A7C15 % (1 << 60) for n in range(self.blocks)
                ),
                block_tokens=256.0,
                arrived=self.now,
                now=self.now,
            )
            prefill = self.prefill[number % len(self.prefill)]
            self.prefills.append((context, self.registry.work.reserve(prefill, context)))


@pytest.mark.parametrize("blocks", [0, 8])
def test_publish(benchmark: Any, blocks: int) -> None:
    load = Load(fleet(16), blocks)
    sent: list[bytes] = []
    for _ in range(10):
        load.work()
        load.replica.publish(load.now)

    def publish() -> None:
        sent.extend(load.replica.publish(load.now))

    benchmark.pedantic(publish, setup=load.work, rounds=ROUNDS)
    told = sum(map(len, sent)) / (ROUNDS * BATCH)
    benchmark.extra_info |= {"us_a_request": round(1e6 * benchmark.stats["median"] / BATCH, 2)}
    print(
        f"\n{blocks} blocks: {benchmark.extra_info}, {told:.0f} bytes a request, hashes {8 * blocks} of them"
    )
    assert told - 8 * blocks <= 100


@pytest.mark.parametrize("blocks", [0, 8])
def test_receive(benchmark: Any, blocks: int) -> None:
    load = Load(fleet(16), blocks)
    other = Replica(fleet(16), "b", KEY)

    def told() -> tuple[tuple[list[bytes], float], dict[str, Any]]:
        load.work()
        return (load.replica.publish(load.now), load.now), {}

    def receive(messages: list[bytes], now: float) -> None:
        for each in messages:
            other.receive(each, now)

    benchmark.pedantic(receive, setup=told, rounds=ROUNDS)
    benchmark.extra_info |= {"us_a_request": round(1e6 * benchmark.stats["median"] / BATCH, 2)}
    print(f"\n{blocks} blocks: {benchmark.extra_info}")
    assert other.received >= ROUNDS
