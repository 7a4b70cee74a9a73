"""Several schedulers that watch one fleet, and have one clock."""

from __future__ import annotations

import aiohttp

from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import HealthPolicy, Registry
from vllm_pd_scheduler.health import HealthMonitor
from vllm_pd_scheduler.health.names import NameResolver
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.replicas import FleetKey, Replica
from vllm_pd_scheduler.telemetry import Telemetry

from .instances import Fixture, Server

KEY = FleetKey("fleet")
INTERVAL_S = 5.0
START = "process_start_time_seconds 1.7e9\n"
IDLE = "vllm:num_requests_running 0\nvllm:num_requests_waiting 2\n"
D = InstanceRole.DECODE


class Scheduler:
    """One replica and what it sees."""

    def __init__(
        self, fleet: Schedulers, name: str, session: aiohttp.ClientSession, interval: float = INTERVAL_S
    ) -> None:
        self.fleet, self.name = fleet, name
        self.registry = Registry(HealthPolicy(unhealthy_threshold=2, healthy_threshold=1))
        self.replica = Replica(self.registry, name, KEY)
        self.hung: list[str] = []
        self.deaf = False
        """Whether it hears nothing, and is not heard."""
        self.addresses: dict[str, list[str]] = {}
        self.monitor = HealthMonitor(
            self.registry,
            Telemetry(),
            session,
            interval=interval,
            timeout=0.5,
            clock=lambda: fleet.now,
            names=NameResolver(lambda host: self.addresses.get(host, ["127.0.0.1"])),
            hung=lambda endpoint: self.hung.append(endpoint.id),
            peers=self.replica.probes,
        )
        self.replica.probes.listener = self.monitor.shared

    def add(self, name: str, port: int, role: InstanceRole, host: str, ranks: int) -> None:
        self.registry.add(PDInstance(name, role, host, port, data_parallel_size=ranks))

    def __getitem__(self, name: str) -> Endpoint:
        return self.registry.get(name)

    async def look(self) -> None:
        """Probe what is for it to probe."""
        for ranks in self.registry.instances():
            if self.monitor.shared.looks(ranks[0]):
                await self.monitor.check(ranks[0])

    def looks(self, name: str) -> bool:
        return self.monitor.shared.looks(self[name])


class Schedulers:
    """Several of them, one clock, and one fleet."""

    def __init__(self, fixture: Fixture) -> None:
        self.now = 100.0
        self.fixture = fixture
        self.all: list[Scheduler] = []
        self.servers: dict[str, Server] = {}

    def join(self, *names: str, interval: float = INTERVAL_S) -> list[Scheduler]:
        new = [Scheduler(self, name, self.fixture.session, interval) for name in names]
        self.all += new
        return new

    async def serve(
        self, name: str, role: InstanceRole = D, host: str = "127.0.0.1", ranks: int = 1, page: str = IDLE
    ) -> Server:
        server = self.servers[name] = await self.fixture.serve(None)
        server.page = START + page
        for one in self.all:
            one.add(name, server.port, role, host, ranks)
        return server

    def exchange(self) -> None:
        """Have all tell all others what there is to tell."""
        for one in self.all:
            for data in one.replica.publish(self.now):
                for other in self.all:
                    if not (one.deaf or other.deaf):
                        other.replica.receive(data, self.now)

    async def rounds(self, count: int = 1) -> None:
        """Let so many intervals pass, each with a look of everybody at what is for it to look at."""
        for _ in range(count):
            for _ in range(5):
                self.now += INTERVAL_S / 5
                self.exchange()
            for one in self.all:
                await one.look()
                self.exchange()

    async def acquaint(self) -> None:
        """Have all look at all, hear of each other, and look at their own."""
        for one in self.all:
            await one.monitor.check_all()
        self.exchange()
        await self.rounds(2)
        for server in self.servers.values():
            server.probes = server.scrapes = 0
            server.authorization.clear()

    def owner(self, name: str) -> Scheduler:
        (found,) = [one for one in self.all if one.replica.probes.ours(one[name])]
        return found

    def other(self, name: str) -> Scheduler:
        return next(one for one in self.all if one is not self.owner(name))
