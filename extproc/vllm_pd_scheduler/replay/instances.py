"""The simulated instances of a replay, and what is seen of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..fleet.endpoint import Endpoint
from ..models import InstanceRole, MetricsSnapshot, PDInstance
from ..sim.engine import Engine
from ..sim.profile import EngineProfile
from ..sim.virtual import VirtualClock, VirtualInstance
from .result import LoadSample
from .schedulers import OneScheduler
from .topology import Topology

Told = Callable[[str, list[tuple[int, bool]], float], None]
"""Called with an instance, which blocks it has cached (true) or evicted, and when."""


class Instances:
    """Instances by name, as all schedulers have them.

    Transfers go over a ``topology``, if there is one, and ``events`` is called with what caches have.
    """

    def __init__(
        self,
        clock: VirtualClock,
        schedulers: list[OneScheduler],
        topology: Topology | None,
        events: Told | None,
    ) -> None:
        self._clock = clock
        self._schedulers = schedulers
        self._topology = topology
        self._events = events
        self._by_name: dict[str, VirtualInstance] = {}

    def __getitem__(self, name: str) -> VirtualInstance:
        return self._by_name[name]

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, role: InstanceRole, count: int, profile: EngineProfile) -> None:
        """Register so many of a role, all healthy."""
        for number in range(count):
            host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            self.register(PDInstance(f"{role}-{number}", role, host, 8000), number, profile)

    def register(self, described: PDInstance, number: int, profile: EngineProfile) -> None:
        """Register one, healthy. Its ``number`` says where in the topology it is."""
        self._by_name[described.instance_id] = self._instance(described.instance_id, number, profile)
        for one in self._schedulers:
            endpoint = one.registry.add(described)
            one.registry.probed(endpoint, None)
            endpoint.holder.resize(profile.num_blocks)

    def _instance(self, name: str, number: int, profile: EngineProfile) -> VirtualInstance:
        topology, events = self._topology, self._events
        instance = VirtualInstance(
            Engine(profile),
            self._clock,
            transport=topology.carry if topology else None,
            on_cache=partial(events, name) if events else None,
        )
        if topology:
            topology.add(instance, number, profile.transfer_bandwidth)
        return instance

    def scraped(self, one: OneScheduler, endpoint: Endpoint) -> MetricsSnapshot:
        """Return what a scheduler's scrape of an engine's ``/metrics`` shows."""
        instance, before = self._by_name[endpoint.id], one.scraped.get(endpoint)
        seen = one.scraped[endpoint] = instance.snapshot()
        gaps = seen.gaps - before.gaps if before else 0
        return MetricsSnapshot(
            self._clock.now,
            seen.running,
            seen.waiting,
            seen.kv_usage,
            kv_capacity=instance.engine.profile.capacity,
            step_time=(seen.gap_seconds - before.gap_seconds) / gaps if before and gaps else None,
            output_tokens=seen.generation_tokens - before.generation_tokens if before else 0.0,
            finished=seen.finished - before.finished if before else 0.0,
        )

    def load(self) -> list[LoadSample]:
        """Return the load of all of them."""
        seen = {name: each.snapshot() for name, each in self._by_name.items()}
        now = self._clock.now
        return [LoadSample(now, name, s.running, s.waiting, s.kv_usage) for name, s in seen.items()]

    def busy(self, role: InstanceRole, end: float) -> dict[str, float]:
        """Return the share of a run, up to its end, in which each instance of a role computed."""
        endpoints = self._schedulers[0].registry.endpoints(role)
        return {e.id: self._by_name[e.id].snapshot().busy / end if end else 0.0 for e in endpoints}
