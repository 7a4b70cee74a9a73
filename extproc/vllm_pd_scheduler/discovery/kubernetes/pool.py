"""An InferencePool: which pods it has, and at which ports each of them serves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from .api import Api
from .objects import InferencePool, Pod
from .pods import PODS
from .telling import Part, Telling
from .watch import ListWatch, Resource

POOLS = Resource("inference.networking.k8s.io/v1", "inferencepools", InferencePool)


class PoolWatch:
    """Follows a pool and its pods. While there is no such pool, its selector is the last that it had."""

    def __init__(self, api: Api, namespace: str, name: str, telling: Telling) -> None:
        self.ports: tuple[int, ...] = ()
        """At which each of its pods serves."""
        self._api = api
        self._namespace = namespace
        self._name = name
        self._own, self._of_pods = Part(telling), Part(telling)
        self._pools = ListWatch(api, POOLS, namespace, self, fields=f"metadata.name={name}")
        self._tasks = asyncio.TaskGroup()
        self._selector = ""
        self._pods: ListWatch[Pod] | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def pods(self) -> Mapping[str, Pod] | None:
        """Its pods by name, ``None`` if they are not known yet."""
        return self._pods.objects if self._pods is not None and self._pods.listed else None

    async def follow(self) -> None:
        """Keep in step until this is cancelled."""
        async with self._tasks:
            await self._pools.follow()

    def changed(self) -> None:
        """Take the pool as it is now."""
        pool = self._pools.objects.get(self._name)
        if pool is None:
            self._own.lost(f"there is no InferencePool {self._name} in namespace {self._namespace}")
            return
        labels = pool.spec.selector.match_labels or {}
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        if not selector:
            self._own.lost(f"the InferencePool {self._name} selects no label")
            return
        self.ports = tuple(port.number for port in pool.spec.target_ports)
        if selector != self._selector:
            self._selector = selector
            self._follow_pods()
        self._own.changed()

    def alive(self) -> None:
        """Hear that the pool is as it was told, or not there."""
        if self._pools.objects.get(self._name) is not None:
            self._own.alive()

    def lost(self, reason: str) -> None:
        """Hear that the pool is not known."""
        self._own.lost(reason)

    def _follow_pods(self) -> None:
        if self._following is not None:
            self._following.cancel()
        self._pods = ListWatch(self._api, PODS, self._namespace, self._of_pods, labels=self._selector)
        self._following = self._tasks.create_task(self._pods.follow())
