"""Turns an instance: it drains, and has the other role when nothing is left on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..fleet.registry import UnknownInstance
from ..handoff.role_switch import NotSwitched, RoleSwitch
from ..models import By, InstanceRole
from ..records.events import EventKind
from ..router import PDRouter
from .changes import AdminChanges
from .refusals import CannotTurn, Leaving, NotKept, NotShared

POLL_S = 0.1
"""Seconds between two looks whether a drain is over: a choice, as for a call that waits for one."""


class Turning:
    """Turns one instance at a time, so that at no moment more than one is missing.

    ``is_ready`` returns ``False`` once the scheduler is shutting down. To undrain an instance ends its turn.
    """

    def __init__(
        self,
        router: PDRouter,
        changes: AdminChanges,
        is_ready: Callable[[], bool],
        switch: RoleSwitch | None = None,
    ) -> None:
        self._router = router
        self._changes = changes
        self._is_ready = is_ready
        self._switch = switch
        self._turns: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def begin(self, instance_id: str, by: str) -> None:
        """Drain an instance, to turn it later.

        Raises :exc:`CannotTurn`, and what a drain raises: the last of a role that can serve stays.
        """
        if self._turns is not None:
            raise CannotTurn(
                f"{self._turns} is being turned, and only one is at a time: undrain it to end that"
            )
        role = self._changes.turned(instance_id).role
        self._turns = instance_id
        try:
            await self._changes.drain(instance_id, by=by)
        except BaseException:
            self._turns = None
            raise
        self._task = asyncio.create_task(self._finish(instance_id, role, by))

    async def wait(self, seconds: float | None) -> None:
        """Wait until the turn is over, or for so long."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=seconds)

    async def close(self) -> None:
        """Give up a turn that is not over; the instance stays drained."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _finish(self, instance_id: str, role: InstanceRole, by: str) -> None:
        try:
            problem = await self._turned(instance_id, role, by)
            self._router.telemetry.instances.turned(role, by.partition(" ")[0], done=problem is None)
            if problem is not None:
                text = f"{instance_id} was not turned: {problem}"
                events = self._router.events
                events.add(EventKind.STATE, text, by=by, subject=instance_id, level=logging.WARNING)
        finally:
            self._turns = None

    async def _turned(self, instance_id: str, role: InstanceRole, by: str) -> str | None:
        """Turn an instance when it is drained; return why that was not done, if it was not."""
        registry = self._router.registry
        try:
            while registry.get(instance_id).draining and not registry.drained(instance_id):
                if not self._is_ready():
                    if by == By.ADVICE:  # nobody is there who would turn it later
                        await self._changes.undrain(instance_id, by)
                    return "the scheduler ends"
                await asyncio.sleep(POLL_S)  # no event tells that a request has ended
            if not registry.get(instance_id).draining:
                return "it was undrained"
            try:
                self._changes.turned(instance_id)  # before its engine is told
                await self._told(instance_id, role)
                await self._make(instance_id, by)
            except (CannotTurn, ValueError) as error:  # what has become so since: it is needed where it is
                await self._changes.undrain(instance_id, by)
                return str(error)
            except NotSwitched as error:
                if not error.usable:
                    await self._changes.drain(instance_id, force=True, by=by)  # it may have been undrained
                    return f"{error}; it stays drained: look at it, and undrain it"
                await self._changes.undrain(instance_id, by)
                return str(error)
        except UnknownInstance:
            return "it was removed"
        except NotShared as error:
            return (
                f"the log of the replicas does not take it: {error}; it stays drained until it is undrained"
            )
        except NotKept as error:
            return f"{error}; it stays drained until it is undrained"
        except Leaving as error:
            return str(error)
        return None

    async def _make(self, instance_id: str, by: str) -> None:
        """Have an instance count with the other role; if that cannot be, tell its engine that it has not."""
        before = self._router.registry.get(instance_id).instance.role
        try:
            await self._changes.turn(instance_id, by)
        except (CannotTurn, Leaving, NotKept, ValueError) as error:
            try:
                await self._told(instance_id, before)
            except NotSwitched as back:
                raise NotSwitched(f"{error}, and its engine keeps the other role: {back}", False) from None
            raise

    async def _told(self, instance_id: str, role: InstanceRole) -> None:
        """Tell an engine which role it is to have, if its protocol wants that."""
        if self._switch is not None:
            await self._switch(self._router.registry.get(instance_id), role)
