"""The changes that the admin interface makes: kept in a file first, then made, or refused."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ..fleet.registry import DuplicateInstance
from ..models import PD_ROLES, By, InstanceRole, join_address
from ..records.events import EventKind
from ..router import PDRouter
from ..scheduler.shadow import Shadow
from ..sync import channel
from ..sync.channel import Channel, Overtaken
from .change_log import ChangeLog
from .moves import move
from .refusals import CannotTurn, LastRoutable, Leaving, NotKept, NotShared
from .saved_changes import AS_CONFIGURED, AdminState, SavedInstance, Steered, difference, summary
from .state_file import StateFile

log = logging.getLogger(__name__)

KEEP_S = 10.0
"""How long a change may take to be on the disk, in seconds; it is refused then."""

Make = Callable[[], object]
Prepare = Callable[[Steered], Make]
"""Makes a change to what is kept, and returns what makes it in the router; raises what speaks against it."""


class AdminChanges:
    """Changes a router, one change after another.

    With ``state_file`` in the configuration each is on the disk before it counts, or raises
    :exc:`NotKept` and changes nothing. The file is written off the event loop: a disk that hangs holds up no
    request. With other replicas each is in their log before it counts, or raises :exc:`NotShared`. The file
    follows then: what it holds counts where the log is empty.
    """

    def __init__(self, router: PDRouter) -> None:
        self._router = router
        path = router.config.state_file
        self._file = StateFile(Path(path)) if path else None
        self._added: dict[str, SavedInstance] = {}
        self._one_at_a_time = asyncio.Lock()
        self._log: ChangeLog | None = None
        self._saves: asyncio.Future[None] | None = None
        self._writing = asyncio.Lock()
        self.steered_at = -math.inf
        """When anybody but the scheduler itself has last changed something, by the router's clock."""
        self.saves = True
        """Whether this process writes the file. Of several that have one file, one does."""
        self.file_first = False
        """Whether a change is on the disk before it is in a log that does not outlive the machine."""

    def share(self, channel: Channel, replica: str) -> ChangeLog:
        """Make each change at all replicas from now on, this one among them; return what hears of the log."""
        self._log = ChangeLog(channel, replica, self)
        return self._log

    def source(self, instance_id: str) -> str:
        """Return who names an instance; nobody does if it is empty, and it goes when its requests end."""
        return ", ".join(self._router.membership.sources(instance_id))

    def restore(self) -> None:
        """Make the changes that the file tells of. What cannot be used is a warning, never an error."""
        state = None if self._file is None else self._file.read()
        if state is None:
            return
        path = self._router.config.state_file
        added, problems = move(AS_CONFIGURED, state, self._router, By.START)
        self._added = {item.id: item for item in added}
        for problem in problems:
            log.warning("state_file %s: skipped: %s", path, problem)
        log.info("state_file %s: %s", path, summary(state))

    async def use(self, names: Mapping[InstanceRole, str], by: str = By.ADMIN) -> None:
        """Change the strategies of roles; raises :exc:`~vllm_pd_scheduler.strategies.UnknownStrategy`."""
        scheduler = self._router.scheduler

        def prepare(steered: Steered) -> Make:
            steered.strategies |= names
            put = scheduler.strategies.prepare(names)

            def make() -> None:
                before = scheduler.strategies.name
                put()
                self._tell(EventKind.STRATEGY, "strategy", before, scheduler.strategies.name, by)

            return make

        await self._make(prepare, by)

    async def use_shadow(self, name: str | None, by: str = By.ADMIN) -> None:
        """Begin anew with a shadow strategy, or have none; raises as ``use``."""
        scheduler = self._router.scheduler

        def prepare(steered: Steered) -> Make:
            steered.shadow = name
            put = scheduler.strategies.prepare_shadow(name)

            def make() -> None:
                before = _name(scheduler.strategies.shadow)
                put()
                self._tell(EventKind.SHADOW, "shadow strategy", before, name, by)

            return make

        await self._make(prepare, by)

    def _tell(self, kind: EventKind, what: str, before: str | None, now: str | None, by: str) -> None:
        instead = "" if before in (now, None) else f", no longer {before}"
        self._router.events.add(kind, f"{what} is {now or 'none'}{instead}", by=by)

    async def add(self, item: SavedInstance, by: str = By.ADMIN) -> None:
        """Register an instance in the router.

        Raises :exc:`~vllm_pd_scheduler.fleet.registry.DuplicateInstance`, or another :exc:`ValueError` that
        names the key that cannot be used: its API key cannot be read, say.
        """

        def prepare(steered: Steered) -> Make:
            instance = self._router.config.instance(item.role, item)
            if not self._router.membership.leaves(item.id):
                self._router.registry.refuse_double(instance)
            for other in self._router.get_instances():
                if (other.host, other.port) == (item.host, item.port) and other.instance_id != item.id:
                    address = join_address(item.host, item.port)
                    raise DuplicateInstance(
                        f"{address} is already the {other.role} instance {other.instance_id!r}"
                    )
            steered.added[item.id], steered.draining[item.id] = item, False
            steered.removed = [each for each in steered.removed if not item.is_at(each)]
            return partial(self._router.register_instance, instance, by)

        await self._make(prepare, by)

    async def remove(self, instance_id: str, *, force: bool = False, by: str = By.ADMIN) -> None:
        """Unregister an instance; the last one of its role that can serve only with ``force``.

        Raises :exc:`LastRoutable` or :exc:`~vllm_pd_scheduler.fleet.registry.UnknownInstance`.
        """

        def prepare(steered: Steered) -> Make:
            self._can_go(instance_id, force)
            del steered.draining[instance_id]
            steered.added.pop(instance_id, None)
            steered.removed += self._router.membership.hides(instance_id)
            return partial(self._router.unregister_instance, instance_id, by)

        await self._make(prepare, by)

    async def drain(self, instance_id: str, *, force: bool = False, by: str = By.ADMIN) -> None:
        """Drain an instance; raises as ``remove``."""

        def prepare(steered: Steered) -> Make:
            self._can_go(instance_id, force)
            steered.draining[instance_id] = True
            return partial(self._router.drain_instance, instance_id, by)

        await self._make(prepare, by)

    def turned(self, instance_id: str) -> SavedInstance:
        """Return an instance as it is described with the other role.

        Raises :exc:`CannotTurn`, and :exc:`~vllm_pd_scheduler.fleet.registry.UnknownInstance`.
        """
        instance = self._router.registry.get(instance_id).instance
        listed = (SavedInstance(role=role, **dict(item)) for role, _, item in self._router.config.listed())
        known = [*self._added.values(), *listed]
        item = next((each for each in known if each.is_at(instance)), None)
        if item is None:
            sources = self.source(instance_id) or "no source"
            raise CannotTurn(f"{instance_id} is named by {sources}: change its role there")
        if instance.role not in PD_ROLES or not item.both_roles:
            raise CannotTurn(
                f"{instance_id} has no both_roles in its configuration: only a P that can be a D, or a D "
                "that can be a P, may be turned"
            )
        for other in self._router.get_instances():
            if (other.host, other.port) == (item.host, item.port) and other.instance_id != item.id:
                raise CannotTurn(f"{other.instance_id} has the same address as {instance_id}")
        if not any(each.instance != instance for each in self._router.registry.routable(instance.role)):
            raise CannotTurn(f"{instance_id} is the last {instance.role} instance that can serve")
        other_role = next(role for role in PD_ROLES if role is not instance.role)
        return item.model_copy(update={"role": other_role})

    async def turn(self, instance_id: str, by: str = By.ADMIN) -> None:
        """Give an instance on which nothing is left the other role; raises as :meth:`turned`."""

        def prepare(steered: Steered) -> Make:
            item, router = self.turned(instance_id), self._router
            if not router.registry.drained(instance_id):
                raise CannotTurn(f"{instance_id} is not drained")
            instance = router.config.instance(item.role, item)
            removed = (*steered.removed, *router.membership.hides(instance_id))
            steered.removed = [each for each in removed if not item.is_at(each)]
            steered.added[item.id], steered.draining[item.id] = item, False

            def make() -> None:
                router.unregister_instance(instance_id, by)
                router.register_instance(instance, by)
                text = f"{instance_id} was turned: it is a {item.role} instance now"
                router.events.add(EventKind.STATE, text, by=by, subject=instance_id)

            return make

        await self._make(prepare, by)

    async def undrain(self, instance_id: str, by: str = By.ADMIN) -> None:
        """End a drain; raises :exc:`~vllm_pd_scheduler.fleet.registry.UnknownInstance`."""

        def prepare(steered: Steered) -> Make:
            self._router.registry.get(instance_id)
            if self._router.membership.leaves(instance_id):
                raise Leaving(instance_id)
            steered.draining[instance_id] = False
            return partial(self._router.undrain_instance, instance_id, by)

        await self._make(prepare, by)

    def _can_go(self, instance_id: str, force: bool) -> None:
        """Raise if an instance is not there or, without ``force``, is the last that can serve in its role."""
        registry = self._router.registry
        endpoint = registry.get(instance_id)
        if not force and registry.routable(endpoint.instance.role) == registry.ranks_of(endpoint):
            raise LastRoutable(endpoint)

    def _note(self, by: str) -> None:
        if not by.startswith(By.ADVICE):
            self.steered_at = self._router.clock()

    async def _make(self, prepare: Prepare, by: str) -> None:
        self._note(by)
        change = _Change(prepare, by)
        made = asyncio.ensure_future(self._keep_and_make(change))
        try:
            async with asyncio.timeout(KEEP_S):
                await asyncio.shield(made)
        except TimeoutError:
            if self._log is not None and not self.file_first:
                raise NotShared(f"it has taken only those of others for {KEEP_S:g} s") from None
            raise NotKept(f"the disk has not answered for {KEEP_S:g} s") from None
        finally:
            if not made.done():
                change.given_up = True
                made.add_done_callback(_forget)

    async def _keep_and_make(self, change: _Change) -> None:
        async with self._one_at_a_time:
            while not change.given_up:
                try:
                    await self._keep_once(change)
                    return
                except Overtaken:
                    pass  # by another replica, whose change was made: look again whether this one is right

    async def _keep_once(self, change: _Change) -> None:
        before = self.state()
        steered = Steered.of(self._router, self._added.values())
        make = change.prepare(steered)
        after = difference(steered, self._router.config)

        def make_it() -> None:
            make()
            self._added = steered.added

        if self._log is not None:
            if not self.file_first:
                await self._log_and_make(self._log, before, after, change, make_it)
                return
            # Until it is made: what follows the log must not write the state before.
            async with self._writing:
                await self._write(after)
                if change.given_up:
                    await self._write(before)
                else:
                    await self._log_and_make(self._log, before, after, change, make_it)
            return
        await self._write(after)
        if change.given_up:  # on the disk after all, too late: whoever asked was told that it is not
            await self._write(self.state())
            return
        try:
            make_it()
        except (ValueError, KeyError):
            # A source of instances has changed something meanwhile that speaks against it.
            await self._write(self.state())
            raise

    async def _log_and_make(
        self, log: ChangeLog, before: AdminState, after: AdminState, change: _Change, make: Callable[[], None]
    ) -> None:
        try:
            await log.keep(before, after, change.by, make)
        except channel.NotKept as error:
            raise NotShared(str(error)) from None
        finally:
            self._save()

    # -- what other replicas change

    def state(self) -> AdminState:
        """Return how the router differs from its configuration."""
        return difference(Steered.of(self._router, self._added.values()), self._router.config)

    def move(self, before: AdminState, after: AdminState, by: str) -> None:
        """Make what differs between two states, as another replica has made it."""
        self._note(by)
        scheduler = self._router.scheduler
        strategy, shadow = scheduler.strategies.name, _name(scheduler.strategies.shadow)
        added, problems = move(before, after, self._router, by)
        for problem in problems:
            log.warning("a change of another replica (%s) is not made here: %s", by, problem)
        kept = {each.id for each in after.added}
        self._added = {key: item for key, item in self._added.items() if key in kept}
        self._added |= {item.id: item for item in added}
        if scheduler.strategies.name != strategy:
            self._tell(EventKind.STRATEGY, "strategy", strategy, scheduler.strategies.name, by)
        if _name(scheduler.strategies.shadow) != shadow:
            self._tell(EventKind.SHADOW, "shadow strategy", shadow, _name(scheduler.strategies.shadow), by)
        self._save()

    def _save(self) -> None:
        """Have the file follow what the log has: a disk that fails refuses nothing then."""
        if self._file is not None and self.saves and (self._saves is None or self._saves.done()):
            self._saves = asyncio.ensure_future(self._save_all())

    async def _save_all(self) -> None:
        saved = None
        while saved != self.state():
            async with self._writing:
                saved = self.state()
                try:
                    await self._write(saved)
                except NotKept:
                    return  # an error was logged

    async def _write(self, state: AdminState) -> None:
        if self._file is not None:
            await self._file.write(state)


class _Change:
    """A change, and whether the one who asked for it waits no more."""

    def __init__(self, prepare: Prepare, by: str) -> None:
        self.prepare = prepare
        self.by = by
        self.given_up = False


def _name(shadow: Shadow | None) -> str | None:
    return None if shadow is None else shadow.name


def _forget(made: asyncio.Future[None]) -> None:
    """Ignore the outcome: nobody waits for it."""
    if not made.cancelled():
        made.exception()
