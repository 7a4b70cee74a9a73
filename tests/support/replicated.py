"""Replicas of the scheduler as processes that meet at a real Valkey or Redis, with Envoys before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.support.processes import Client, Process, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.valkey import Server
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.envoy.schedulers import SchedulerAddress


@dataclass
class Replica:
    """One scheduler."""

    name: str
    stack: Stack
    config: dict[str, Any]
    session: aiohttp.ClientSession
    processes: ExitStack
    process: Process = field(init=False)

    def start(self) -> None:
        self.process = self.processes.enter_context(spawned(self.stack.serve(self.config)))

    async def get(self, path: str) -> tuple[int, Any]:
        """Return the status and the answer of its admin interface."""
        async with self.session.get(self.stack.admin + path) as response:
            return response.status, await response.json()

    async def in_flight(self) -> dict[str, int]:
        """Return what it counts as in flight, its own and the others', by instance."""
        _, found = await self.get("/instances")
        return {each["id"]: each["in_flight"] for each in found["instances"] if each["in_flight"]}

    async def chose(self, request: str) -> bool:
        _, found = await self.get(f"/decisions?request_id={request}")
        return bool(found["decisions"])

    async def is_ready(self) -> bool:
        try:
            return (await self.get("/readyz"))[0] == 200
        except aiohttp.ClientError:
            return False

    async def hears(self, count: int) -> bool:
        """Whether it is connected, and hears so many others."""
        _, found = await self.get("/status")
        return bool(found["replicas"]["connected"]) and len(found["replicas"]["others"]) == count

    async def is_alone(self) -> bool:
        """Whether it is ready, though it has no connection."""
        status, found = await self.get("/readyz")
        return status == 200 and "no connection to the other replicas" in found.get("replicas", "")


@dataclass
class Site:
    """All that runs."""

    session: aiohttp.ClientSession
    fleet: Fleet
    server: Server
    replicas: dict[str, Replica]
    clients: list[Client]
    """One of each Envoy, and of the admin interface of the first of its nearest replicas."""

    async def agree(self, in_flight: dict[str, int], without: str = "") -> None:
        """Wait until all replicas but one count this."""
        counted: dict[str, dict[str, int]] = {}

        async def all_do() -> bool:
            for each in self.replicas.values():
                if each.name != without:
                    counted[each.name] = await each.in_flight()
            return all(each == in_flight for each in counted.values())

        try:
            await until(all_do)
        except TimeoutError:
            raise AssertionError(f"in flight are {in_flight}, counted {counted}") from None

    async def until_each(self, count: int) -> None:
        """Wait until each hears so many others."""
        for each in self.replicas.values():
            await until(lambda each=each: each.hears(count))

    async def until_alone(self, *names: str) -> None:
        """Wait until these have no connection."""
        for name in names:
            await until(self.replicas[name].is_alone)


@asynccontextmanager
async def replicated(
    fleet: Fleet,
    directory: Path,
    server: Server,
    urls: Mapping[str, str],
    nearest: Sequence[Sequence[str]],
    **settings: Any,
) -> AsyncIterator[Site]:
    """Run a replica for each name, which meets the others at a URL, and Envoys.

    ``nearest`` are, for each Envoy, the replicas that it asks while they are healthy; it knows them all.
    """
    timeout, no_limit = aiohttp.ClientTimeout(total=None, sock_read=30), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=no_limit) as session:
        with ExitStack() as processes:
            replicas = {}
            for name, url in urls.items():
                (directory / name).mkdir()
                config = {**settings, **fleet.config(), "replicas": {"url": url, "name": name}}
                replicas[name] = Replica(name, Stack(directory / name), config, session, processes)
                replicas[name].start()
            clients = []
            for names in nearest:
                stack, envoy = _envoy(directory, names, replicas, processes)
                clients.append(Client(session, stack, fleet))
                await ready(clients[-1], envoy)
            found = Site(session, fleet, server, replicas, clients)
            for each in replicas.values():
                await until(each.is_ready)
            await found.until_each(len(replicas) - 1)
            yield found
            for each in replicas.values():
                assert "Traceback" not in each.process.output


def _envoy(
    directory: Path, nearest: Sequence[str], replicas: Mapping[str, Replica], processes: ExitStack
) -> tuple[Stack, Process]:
    schedulers = [
        SchedulerAddress(f"127.0.0.1:{each.stack.ports.grpc}", name, int(name not in nearest))
        for name, each in replicas.items()
    ]
    ports = EnvoyPorts(*unused_ports(4), "127.0.0.1")
    path = directory / f"envoy-{nearest[0]}.yaml"
    path.write_text(yaml.safe_dump(render_config(ports, schedulers=schedulers)))
    options = ["--log-level", "warning", "--disable-hot-restart", "--concurrency", "1"]
    envoy = processes.enter_context(spawned([find_envoy(), "-c", str(path), *options]))
    return Stack(directory, ports, replicas[nearest[0]].stack.admin_port), envoy
