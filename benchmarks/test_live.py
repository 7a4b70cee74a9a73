"""What a second of the dashboard's stream costs, however many watch: a look, and its encoding."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.admin.event_stream import Streams
from vllm_pd_scheduler.admin.live_api import LiveApi
from vllm_pd_scheduler.admin.live_feed import LiveFeed
from vllm_pd_scheduler.admin.process_api import ProcessApi
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.router import PDRouter


def fleet(instances: int) -> PDRouter:
    """A router with so many healthy instances, half of them of each role."""
    router = PDRouter(SchedulerConfig())
    for number, role in itertools.product(range(instances // 2), InstanceRole):
        host = f"10.{1 + (role is InstanceRole.DECODE)}.{number // 250}.{number % 250 + 1}"
        router.register_instance(PDInstance(f"{role}-{number}", role, host, 8000))
    for endpoint in router.registry:
        router.registry.probed(endpoint, None)
    return router


def scrape(router: PDRouter, kv_usage: float) -> None:
    """Have all instances answer something else than before."""
    for endpoint in router.registry:
        metrics = MetricsSnapshot(
            time.monotonic(), 3.0 + kv_usage, 2.0, kv_usage, 0.02 + kv_usage, kv_capacity=1e5
        )
        router.registry.scraped(endpoint, metrics, 0, time.monotonic())


@pytest.mark.parametrize("instances", [16, 1000])
@pytest.mark.parametrize("changed", [True, False], ids=["all-changed", "none-changed"])
def test_tick(benchmark: Any, instances: int, changed: bool) -> None:
    router = fleet(instances)
    status = ProcessApi(router, lambda: True).status_of_all
    live = LiveApi(router, Streams(), status, AdminChanges(router).source)
    feed = LiveFeed(live.look, router.events, router.decisions)
    loop, numbers = asyncio.new_event_loop(), itertools.count()
    read = feed.reader()
    scrape(router, 0.5)

    def prepare() -> None:
        if changed:
            scrape(router, next(numbers) % 97 / 100)

    def tick() -> None:
        feed.tick(loop.run_until_complete(live.look()))

    tick()
    benchmark.extra_info["snapshot_bytes"] = len(read())
    tick()  # the events of the start
    read()
    prepare()
    tick()
    benchmark.extra_info["bytes"] = len(read())
    benchmark.pedantic(tick, setup=prepare, rounds=20)
    loop.close()
    print(f"\n{instances} instances: {benchmark.extra_info}")
