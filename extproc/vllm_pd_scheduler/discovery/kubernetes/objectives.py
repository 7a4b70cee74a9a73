"""InferenceObjectives: names that requests may give to be more or less urgent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from .api import Api
from .objects import InferenceObjective
from .watch import ListWatch, Resource

log = logging.getLogger(__name__)

RESOURCES = tuple(
    Resource(version, "inferenceobjectives", InferenceObjective)
    for version in ("inference.networking.x-k8s.io/v1alpha2", "llm-d.ai/v1alpha2")
)
"""The group that it had once, and the one that it has: this one counts where both have a name."""

Priorities = Mapping[str, int]
"""Priorities by the names of objectives: higher goes first, 0 is that of requests without one."""


class Objectives:
    """Follows the objectives of a pool, or all of a namespace, and tells of all that there are.

    There need not be such a kind in the cluster.
    """

    def __init__(
        self, api: Api, namespace: str, pool: str | None, told: Callable[[Priorities], None]
    ) -> None:
        self._pool = pool
        self._tell = told
        self._told: Priorities = {}
        self._watches = [ListWatch(api, each, namespace, self, optional=True) for each in RESOURCES]

    async def follow(self) -> None:
        """Keep in step until this is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for watch in self._watches:
                tasks.create_task(watch.follow())

    def changed(self) -> None:
        """Tell what there is, if it is not what was told."""
        found = {
            name: each.spec.priority or 0
            for watch in self._watches
            for name, each in watch.objects.items()
            if each.spec.is_for(self._pool)
        }
        if found != self._told:
            self._told = found
            self._tell(found)

    def alive(self) -> None:
        """See :class:`.watch.Watcher`."""

    def lost(self, reason: str) -> None:
        """See :class:`.watch.Watcher`."""
        log.warning("%s; the priorities that were known stay", reason)
