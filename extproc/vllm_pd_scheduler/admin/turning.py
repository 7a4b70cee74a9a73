"""Turns an instance: it drains, and has the other role when nothing is left on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ..fleet.registry import UnknownInstance
from ..handoff.role_switch import NotSwitched, RoleSwitch
from ..models import By, InstanceRole
from ..records.events import EventKind
from ..router import PDRouter
from .changes import AdminChanges
from .refusals import CannotTurn, Leaving, NotKept, NotShared

POLL_S = 0.1
"""Seconds between two looks whether a drain is over: a choice, as for a call that waits for one."""
AGAIN_S = 5.0
"""Seconds until it is tried again to end a drain, where that could not be kept: a choice."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an instance was not turned, and if it is yet to be undrained, which role its engine has."""

    why: str
    engine: InstanceRole | None = None


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
        self._over = asyncio.Event()

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
        self._over.clear()
        self._task = asyncio.create_task(self._finish(instance_id, role, by))

    async def wait(self, seconds: float | None) -> None:
        """Wait until the turn is made or has failed, or for so long."""
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._over.wait()

    async def close(self) -> None:
        """Give up a turn that is not over; the instance stays drained."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _finish(self, instance_id: str, role: InstanceRole, by: str) -> None:
        try:
            failure = await self._turned(instance_id, role, by)
            self._router.telemetry.instances.turned(role, by.partition(" ")[0], done=failure is None)
            if failure is not None:
                self._tell(f"{instance_id} was not turned: {failure.why}", instance_id, by)
            self._over.set()
            if failure is not None and failure.engine is not None:
                await self._bring_back(instance_id, failure.engine, by)
        finally:
            self._over.set()
            self._turns = None

    def _tell(self, text: str, instance_id: str, by: str, level: int = logging.WARNING) -> None:
        self._router.events.add(EventKind.STATE, text, by=by, subject=instance_id, level=level)

    async def _turned(self, instance_id: str, role: InstanceRole, by: str) -> _Failure | None:
        """Turn an instance when it is drained; return why that was not done, if it was not."""
        registry = self._router.registry
        try:
            while registry.get(instance_id).draining and not registry.drained(instance_id):
                if not self._is_ready():
                    if by == By.ADVICE:  # nobody is there who would turn it later
                        await self._changes.undrain(instance_id, by)
                    return _Failure("the scheduler ends")
                await asyncio.sleep(POLL_S)  # no event tells that a request has ended
            if not registry.get(instance_id).draining:
                return _Failure("it was undrained")
            before = registry.get(instance_id).instance.role
            try:
                self._changes.turned(instance_id)  # before its engine is told
                await self._told(instance_id, role)
                await self._make(instance_id, by)
            except NotShared as error:  # it may count yet, so its engine is not told to go back
                return _Failure(f"{_untaken(error)}; it stays drained until that does", role)
            except (CannotTurn, NotKept, ValueError) as error:
                return await self._undrained(instance_id, str(error), before, by)
            except NotSwitched as error:
                if error.usable:
                    return await self._undrained(instance_id, str(error), before, by)
                await self._changes.drain(instance_id, force=True, by=by)  # it may have been undrained
                return _Failure(f"{error}; it stays drained: look at it, and undrain it")
        except UnknownInstance:
            return _Failure("it was removed")
        except NotShared as error:
            return _Failure(f"{_untaken(error)}; it stays drained until it is undrained")
        except NotKept as error:
            return _Failure(f"{error}; it stays drained until it is undrained")
        except Leaving as error:
            return _Failure(str(error))
        return None

    async def _undrained(self, instance_id: str, why: str, engine: InstanceRole, by: str) -> _Failure:
        """Have an instance serve as before, at once if that can be kept; return why it was not turned."""
        try:
            await self._changes.undrain(instance_id, by)
        except (NotKept, NotShared) as error:
            return _Failure(f"{why}; it stays drained until that can be undone: {error}", engine)
        return _Failure(why)

    async def _bring_back(self, instance_id: str, engine: InstanceRole, by: str) -> None:
        """Have an instance serve, in the role in which it counts, as soon as that can be kept."""
        registry = self._router.registry
        try:
            while self._is_ready():
                await asyncio.sleep(AGAIN_S)
                with contextlib.suppress(NotKept, NotShared):
                    if registry.get(instance_id).draining:  # once this is kept, its role is certain
                        await self._changes.drain(instance_id, force=True, by=by)
                    role = registry.get(instance_id).instance.role
                    if engine is not role:
                        await self._told(instance_id, role)
                        engine = role
                    await self._changes.undrain(instance_id, by)
                    text = f"{instance_id} serves again: it is a {role} instance"
                    self._tell(text, instance_id, by, logging.INFO)
                    return
        except NotSwitched as error:
            with contextlib.suppress(NotKept, NotShared):
                await self._changes.drain(instance_id, force=True, by=by)  # it may have been undrained
            text = f"{instance_id} is a {role} instance, and its engine is not: {error}"
            self._tell(f"{text}; it stays drained: look at it, and undrain it", instance_id, by)
        except (UnknownInstance, Leaving):
            pass  # it was removed, or will be

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


def _untaken(error: NotShared) -> str:
    return f"the log of the replicas does not take it: {error}"
