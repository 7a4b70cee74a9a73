"""The log of the changes that all replicas make: what this one puts there, and what it makes of the others'.

An entry has the whole state that it leads to. So a replica that comes late needs the newest one alone, and
the log need not grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from ..config import describe_error
from ..models import By
from ..sync.channel import START, Change, Channel, NotKept, Overtaken
from .moves import patch
from .saved_changes import AS_CONFIGURED, AdminState

log = logging.getLogger(__name__)

FROM_FILE_S = 2.0
"""Seconds that one who knows a state from its own file alone leaves to those who have heard the log: that
file may be days old."""
AGAIN_S = 1.0
"""Seconds until it is tried again to put back what an empty log does not take."""


class Entry(BaseModel):
    """A change, as it is in the log."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    version: Literal[1] = 1
    id: str
    replica: str
    """Which one has put it there."""
    by: str
    """Who asked that one."""
    state: AdminState


class Steering(Protocol):
    """Makes the changes of other replicas in a router."""

    def state(self) -> AdminState:
        """Return how the router differs from its configuration."""
        ...

    def move(self, before: AdminState, after: AdminState, by: str) -> None:
        """Make what differs between two states. What cannot be made is said in the log."""
        ...


class ChangeLog:
    """Puts changes into a channel's log, and makes all that come from it, in the log's order."""

    def __init__(self, channel: Channel, replica: str, steering: Steering) -> None:
        self._channel = channel
        self._replica = replica
        self._steering = steering
        self._position = START
        self._state: AdminState | None = None
        """As the newest entry has it; none is known yet."""
        self._unreadable = ""
        """Why the newest entry cannot be used."""
        self._own: tuple[str, Callable[[], None]] | None = None
        """The id of the entry that this replica puts there just now, and what makes the change."""
        self._puts_back: asyncio.Future[None] | None = None

    async def keep(self, before: AdminState, after: AdminState, by: str, make: Callable[[], None]) -> None:
        """Put the change from one state of this router to another into the log, and make it when it is there.

        Raise :exc:`.NotKept` if it is not, and :exc:`.Overtaken` if another change has come first: that was
        made, and the caller may look again whether its own is still right.
        """
        if self._unreadable:
            raise NotKept(f"the newest change in the log of the replicas cannot be read: {self._unreadable}")
        state = patch(before if self._state is None else self._state, before, after)
        entry = Entry(id=secrets.token_hex(8), replica=self._replica, by=by, state=state)
        self._own = entry.id, make
        try:
            await self._put(entry)
        finally:
            self._own = None

    async def _put(self, entry: Entry) -> None:
        await self._channel.append(entry.model_dump_json(exclude_none=True).encode(), self._position)

    def changed(self, change: Change) -> None:
        """Make a change of the log."""
        self._position = change.position
        if change.position == START:
            self._unreadable = ""
            self._put_back()
            return
        try:
            entry = Entry.model_validate_json(change.data)
        except ValidationError as error:
            self._unreadable = "; ".join(map(describe_error, error.errors(include_url=False)))
            log.error(
                "the log of the replicas has a change that this version cannot read (%s): it is not made, "
                "and no change is taken before one that can be read",
                self._unreadable,
            )
            return
        self._unreadable = ""
        before = self._steering.state() if self._state is None else self._state
        self._state = entry.state
        if self._own is not None and entry.id == self._own[0]:
            with contextlib.suppress(ValueError, KeyError):
                self._own[1]()
                return
            # A source of instances has changed something meanwhile that speaks against it.
        if entry.state != before:
            self._steering.move(before, entry.state, f"{entry.by} at {By.REPLICA} {entry.replica}")

    def _put_back(self) -> None:
        """Put into a log that is empty what it has lost, or what was kept at this replica before."""
        if self._puts_back is None or self._puts_back.done():
            self._puts_back = asyncio.ensure_future(self._put_back_state())

    async def _put_back_state(self) -> None:
        if self._state is None:
            if self._steering.state() == AS_CONFIGURED:
                return
            await asyncio.sleep(FROM_FILE_S)
        said = ""
        while self._position == START:
            state = self._steering.state() if self._state is None else self._state
            if state == AS_CONFIGURED:
                return
            try:
                await self._put(
                    Entry(id=secrets.token_hex(8), replica=self._replica, by=By.START, state=state)
                )
                log.warning("the log of the replicas was empty: what operators have changed is put back")
            except Overtaken:
                pass  # another replica has done it
            except NotKept as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("what operators have changed cannot be put back into the log: %s", error)
            await asyncio.sleep(AGAIN_S)
