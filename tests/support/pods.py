"""Simulated instances as the pods of a cluster: each at an address of its own, all at one port."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

from tests.support.kubernetes import ApiServer
from tests.support.kubernetes_objects import pod
from tests.support.processes import unused_ports
from tests.support.sim_fleet import Fleet, SimInstance
from vllm_pd_scheduler.sim.fleet import DECODE_PORT_OFFSET


class Pods:
    """Runs pods, and has the API server tell of them. ``async with`` ends them."""

    def __init__(self, server: ApiServer, arguments: Sequence[str] = ()) -> None:
        self.server = server
        self.port = unused_ports(1)[0]
        self._arguments = arguments
        self._addresses = (f"127.0.0.{number}" for number in itertools.count(11))
        self._running: dict[str, Fleet] = {}

    async def __aenter__(self) -> Pods:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(self.end(name) for name in list(self._running)))

    def __getitem__(self, name: str) -> SimInstance:
        return self._running[name].instances[0]

    @property
    def names(self) -> list[str]:
        return list(self._running)

    async def run(self, name: str, role: str, **labels: str) -> None:
        """Start a pod: it is there at once, and ready when it serves."""
        address = next(self._addresses)
        self.server.put("pods", pod(name, None, role, **labels))
        self.server.put("pods", pod(name, address, role, ready=False, **labels))
        options: dict[str, Any] = {"host": address, "arguments": self._arguments}
        if role == "prefill":
            fleet = Fleet(1, 0, base_port=self.port, **options)
        else:
            fleet = Fleet(0, 1, base_port=self.port - DECODE_PORT_OFFSET, **options)
        self._running[name] = fleet
        await asyncio.to_thread(fleet.start)
        self.server.put("pods", pod(name, address, role, **labels))

    def delete(self, name: str) -> None:
        """Begin to delete a pod: it serves on, as with a ``preStop`` hook."""
        self.server.delete("pods", name)

    async def end(self, name: str) -> None:
        """End a pod's process, and have it there no more."""
        await asyncio.to_thread(self._running.pop(name).stop)
        if name in self.server.names("pods"):
            self.server.remove("pods", name)
