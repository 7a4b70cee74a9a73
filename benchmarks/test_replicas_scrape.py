"""What it costs several schedulers to watch ``INSTANCES``, each of which one of them probes.

The instances are sockets of another process, the clock is made up, and every message goes to all others after
10 ms. Only CPU time counts, of each scheduler by itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
import uvloop
from benchmarks.test_scrape import instances

from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.health import HealthMonitor
from vllm_pd_scheduler.instance_http.session import open_session
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.replicas import BATCH_S, FleetKey, Replica
from vllm_pd_scheduler.system.open_files import raise_open_files_limit
from vllm_pd_scheduler.telemetry import Telemetry

INSTANCES = int(os.environ.get("INSTANCES", "1000"))
INTERVAL_S = 5.0
INTERVALS = 9
"""That are measured: in so many, a scheduler looks once at each instance of which others tell it."""
KEY = FleetKey("fleet")


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    """Ports of instances in another process."""
    raise_open_files_limit()
    with instances(1, INSTANCES) as found:
        yield found


class One:
    """One scheduler and the CPU seconds that it has taken."""

    def __init__(self, name: str, fleet: Fleet, session: aiohttp.ClientSession) -> None:
        self.fleet, self.session = fleet, session
        self.registry = Registry()
        for number, port in enumerate(fleet.ports):
            role = InstanceRole.PREFILL if number % 2 else InstanceRole.DECODE
            self.registry.add(PDInstance(f"instance-{number}", role, "127.0.0.1", port))
        self.replica = Replica(self.registry, name, KEY)
        self.monitor = HealthMonitor(
            self.registry,
            Telemetry(),
            session,
            interval=INTERVAL_S,
            timeout=10.0,
            stalled_after=float("inf"),  # the pages never change
            clock=lambda: fleet.now,
            peers=self.replica.probes,
        )
        self.replica.probes.listener = self.monitor.shared
        self.endpoints = list(self.registry)
        self.seconds = 0.0
        self.probes = self.messages = self.bytes = 0

    async def look(self, number: int) -> None:
        """Probe an instance if that is for it."""
        begun = time.process_time()
        endpoint: Endpoint = self.endpoints[number]
        if self.monitor.shared.looks(endpoint):
            self.probes += 1
            await self.monitor.check(endpoint)
        self.seconds += time.process_time() - begun

    def publish(self) -> list[bytes]:
        """Return what it tells."""
        begun = time.process_time()
        data = self.replica.publish(self.fleet.now)
        self.seconds += time.process_time() - begun
        self.messages += len(data)
        self.bytes += sum(map(len, data))
        return data

    def hear(self, data: bytes) -> None:
        """Take in what another one tells."""
        begun = time.process_time()
        assert self.replica.receive(data, self.fleet.now)
        self.seconds += time.process_time() - begun


class Fleet:
    """All of them, and their clock."""

    def __init__(self, ports: list[int], schedulers: int) -> None:
        self.ports, self.now = ports, 100.0
        self.all = [One(f"scheduler-{number}-5f3a9c", self, open_session()) for number in range(schedulers)]

    async def intervals(self, count: int) -> None:
        """Let so many intervals pass, in which each looks at all that is for it."""
        tell_at = self.now
        for _ in range(count):
            for number in range(INSTANCES):
                self.now += INTERVAL_S / INSTANCES
                for one in self.all:
                    await one.look(number)
                if self.now >= tell_at:
                    tell_at = self.now + BATCH_S
                    self.exchange()

    def exchange(self) -> None:
        """Have each tell all others what is due."""
        for one in self.all:
            for data in one.publish():
                for other in self.all:
                    if other is not one:
                        other.hear(data)


@pytest.mark.parametrize("schedulers", [1, 2, 4])
def test_watching(benchmark: Any, ports: list[int], schedulers: int) -> None:
    """CPU of each scheduler as a percentage of a core, all that they tell in a second, and how many probe."""

    async def run() -> list[One]:
        fleet = Fleet(ports, schedulers)
        fleet.exchange()
        await fleet.intervals(3)
        for one in fleet.all:
            one.seconds, one.probes, one.messages, one.bytes = 0.0, 0, 0, 0
        await fleet.intervals(INTERVALS)
        for one in fleet.all:
            await one.session.close()
        return fleet.all

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ones = benchmark.pedantic(lambda: runner.run(run()), rounds=1)
    passed = INTERVALS * INTERVAL_S
    percent = [100.0 * one.seconds / passed for one in ones]
    benchmark.extra_info |= {
        "percent_of_a_core_each": [round(each, 1) for each in percent],
        "percent_of_a_core_sum": round(sum(percent), 1),
        "probes_a_second": [round(one.probes / passed, 1) for one in ones],
        "messages_a_second": [round(one.messages / passed, 1) for one in ones],
        "bytes_told_a_second": sum(round(one.bytes / passed) for one in ones),
    }
    print(benchmark.extra_info)
    assert all(endpoint.routable and endpoint.metrics for one in ones for endpoint in one.registry)
