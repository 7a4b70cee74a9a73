"""Kubernetes as a source of instances: pods, the endpoints of services, or an InferencePool."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Protocol

from ...config import SchedulerConfig
from ...config.sources import KubernetesSource
from ...models import InstanceRole, PDInstance
from ..source import Beside, Report
from .api import Api, Problem
from .backoff import Backoff
from .candidates import Candidate, Candidates
from .credentials import Credentials
from .objectives import Objectives
from .pods import PODS, PodLabels, PodReader
from .pool import PoolWatch
from .rewrites import ModelRewrites
from .slices import SLICES, read_slices, selector_of
from .telling import Part, Telling
from .watch import ListWatch

Found = tuple[list[Candidate], Mapping[str, list[str]]]
"""What may be instances, and the names of what is left out, by the reasons."""


class KubernetesPods:
    """Follows pods of a namespace, as an entry of the configuration names them."""

    def __init__(self, entry: KubernetesSource, config: SchedulerConfig, beside: Beside) -> None:
        self.name = entry.label
        self._beside = beside
        self._entry = entry
        self._config = config

    async def follow(self, report: Report) -> None:
        """See :class:`~..source.Source`."""
        entry, candidates = self._entry, Candidates(self.name, self._config)

        def instances() -> list[PDInstance] | None:
            found = finder.found()
            return None if found is None else candidates.instances(*found)

        telling = Telling(report, instances)
        async with Api(Credentials(entry.kubeconfig, entry.context)) as api:
            namespace = entry.namespace or await _namespace(api, report)
            finder = _finder(entry, api, namespace, telling)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(finder.follow())
                    if entry.pool is not None:
                        for each in self._of_pool(api, namespace, entry.pool):
                            tasks.create_task(each.follow())
            finally:
                telling.stop()

    def _of_pool(self, api: Api, namespace: str, pool: str) -> tuple[Objectives, ModelRewrites]:
        """Return what follows the objects that a pool may have beside pods."""
        objectives = partial(self._beside.objectives.update, self.name)
        rewrites = partial(self._beside.rewrites.update, self.name)
        return Objectives(api, namespace, pool, objectives), ModelRewrites(api, namespace, pool, rewrites)


class Finder(Protocol):
    """One of the ways to find instances."""

    def found(self) -> Found | None:
        """Return what there is now, ``None`` if that is not known."""
        ...

    async def follow(self) -> None:
        """Keep in step until this is cancelled."""
        ...


class _BySelector:
    """Pods that a label selector chooses."""

    def __init__(
        self, api: Api, namespace: str, selector: str, ports: list[int], reader: PodReader, telling: Telling
    ) -> None:
        self._pods = ListWatch(api, PODS, namespace, Part(telling), labels=selector)
        self._ports = tuple(ports)
        self._reader = reader
        self.follow = self._pods.follow

    def found(self) -> Found | None:
        return self._reader.read(self._pods.objects, self._ports) if self._pods.listed else None


class _OfPool:
    """Pods of an InferencePool."""

    def __init__(self, api: Api, namespace: str, name: str, reader: PodReader, telling: Telling) -> None:
        self._pool = PoolWatch(api, namespace, name, telling)
        self._reader = reader
        self.follow = self._pool.follow

    def found(self) -> Found | None:
        pods = self._pool.pods
        return None if pods is None else self._reader.read(pods, self._pool.ports)


class _OfServices:
    """Endpoints of services."""

    def __init__(
        self, api: Api, namespace: str, services: Mapping[InstanceRole, str], telling: Telling
    ) -> None:
        self._services = services
        self._slices = ListWatch(api, SLICES, namespace, Part(telling), labels=selector_of(services.values()))
        self.follow = self._slices.follow

    def found(self) -> Found | None:
        return read_slices(self._slices.objects.values(), self._services) if self._slices.listed else None


def _finder(entry: KubernetesSource, api: Api, namespace: str, telling: Telling) -> Finder:
    """Return the way that an entry chooses."""
    if entry.services:
        services = {InstanceRole(role): name for role, name in entry.services.items()}
        return _OfServices(api, namespace, services, telling)
    roles = {role: frozenset(entry.roles.get(role.value, ())) for role in InstanceRole}
    labels = PodLabels(
        entry.role_label, roles, entry.model_label, entry.revision_label, entry.data_parallel_size_label
    )
    reader = PodReader(labels)
    if entry.pool is not None:
        return _OfPool(api, namespace, entry.pool, reader, telling)
    return _BySelector(api, namespace, entry.selector or "", entry.ports, reader, telling)


async def _namespace(api: Api, report: Report) -> str:
    """Return the namespace that is meant where none is named, as soon as it is known."""
    backoff = Backoff()
    while True:
        try:
            return await api.namespace()
        except Problem as problem:
            report.lost(str(problem))
        await asyncio.sleep(backoff.pause())
