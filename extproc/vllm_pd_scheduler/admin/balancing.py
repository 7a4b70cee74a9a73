"""Turns instances without an operator, as the advice says, within the limits of ``turning``."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable

from ..advice import Adviser
from ..advice.turns import Turns
from ..config.turning import TurningConfig
from ..fleet.endpoint import Endpoint
from ..fleet.registry import UnknownInstance
from ..models import PD_ROLES, By, InstanceRole
from ..records.events import EventKind
from ..router import PDRouter
from .changes import AdminChanges
from .refusals import CannotTurn, LastRoutable, Leaving, NotKept, NotShared
from .turning import Turning

_OFF_S = 1.0
"""Seconds between two looks whether it is to turn at all."""


class Balancing:
    """Looks at the advice again and again, and turns one instance at a time.

    Of several schedulers the one with the least name does; of workers, the one that operators ask.
    ``is_ready`` returns ``False`` once the scheduler is shutting down. ``of_workers``: this is a worker.
    """

    def __init__(
        self,
        router: PDRouter,
        changes: AdminChanges,
        turning: Turning,
        adviser: Adviser,
        is_ready: Callable[[], bool],
        of_workers: bool = False,
    ) -> None:
        self._router = router
        self._changes = changes
        self._turning = turning
        self._of_workers = of_workers
        self._adviser = adviser
        self._is_ready = is_ready
        self._turns = Turns()
        self._steered_at = -math.inf

    async def run(self) -> None:
        """Look for as long as the scheduler runs."""
        while True:
            limits = self._router.config.turning
            if limits is None:
                self._turns = Turns()
            await asyncio.sleep(_OFF_S if limits is None else limits.interval)
            if limits is not None and limits is self._router.config.turning and self._is_ready():
                await self.look(limits)

    async def look(self, limits: TurningConfig) -> None:
        """Ask for advice, and turn an instance if it is time for that."""
        if (steered := self._changes.steered_at) != self._steered_at:
            self._steered_at = steered
            self._turns.pause(steered, limits.pause)
        if not self._is_first() or self._is_disturbed():
            self._turns.pause(self._router.clock(), 0.0)
            return
        advice = await self._adviser.advise(limits.minutes * 60.0)
        role = self._turns.looked(advice, limits, self._router.clock())
        if role is None or steered != self._changes.steered_at or self._router.config.turning is not limits:
            return
        why = f"{advice.text} (the same {self._turns.looks} times)"
        if await self._turn(role, limits, why):
            self._turns.turned(role, self._router.clock(), limits.pause)
        else:
            self._turns.pause(self._router.clock(), limits.pause)

    async def _turn(self, role: InstanceRole, limits: TurningConfig, why: str) -> bool:
        """Turn an instance of a role; return whether one was turned."""
        least = limits.min_prefill if role is InstanceRole.PREFILL else limits.min_decode
        serving = {each.instance.instance_id for each in self._router.registry.routable(role)}
        chosen = self._chosen(role) if len(serving) > least else None
        if len(serving) <= least:
            problem = f"no fewer than {least} {role} instances may be left"
        elif chosen is None:
            problem = f"no {role} instance can have the other role: none has both_roles and is not the last"
        else:
            name = chosen.instance.instance_id
            self._tell(f"{name} is to have the other role: {why}", name, logging.INFO)
            try:
                await self._turning.begin(name, By.ADVICE)
            except (CannotTurn, LastRoutable, Leaving, NotKept, NotShared, UnknownInstance) as error:
                problem = f"{name} cannot be turned: {error}"
            else:
                await self._turning.wait(None)
                found = self._router.registry.find(name)
                return found is not None and found.instance.role is not role
        self._tell(f"advice that is not followed: {why}; {problem}", "", logging.WARNING)
        return False

    def _chosen(self, role: InstanceRole) -> Endpoint | None:
        """Return an endpoint of the instance with the least to do of those that can be turned."""
        able = []
        for each in self._router.registry.routable(role):
            try:
                self._changes.turned(each.instance.instance_id)
            except (CannotTurn, UnknownInstance):
                continue
            able.append(each)
        return min(able, key=lambda each: each.in_flight, default=None)

    def _is_first(self) -> bool:
        """Whether no other scheduler is to turn. What it does is in the log of all, or not at all."""
        sync = self._router.sync
        if sync is None:
            return True
        key = _replica if self._of_workers else _name
        own = key(sync.replica.name)
        return all(own <= key(each) for each in sync.replica.others)

    def _is_disturbed(self) -> bool:
        """Whether an instance is on its way already, by whomever."""
        every = [each for role in PD_ROLES for each in self._router.registry.endpoints(role)]
        return any(each.draining for each in every)

    def _tell(self, text: str, subject: str, level: int) -> None:
        self._router.events.add(EventKind.STATE, text, by=By.ADVICE, subject=subject, level=level)


def _name(run: str) -> str:
    """Return the name of a scheduler: each run of it has another one after a dot, if it has a name."""
    return run.partition(".")[0]


def _replica(run: str) -> str:
    """Return what the names of the workers of one replica have in common: ``aw1.2ee774b2`` is of ``a``."""
    return re.sub(r"w\d+$", "", _name(run))
