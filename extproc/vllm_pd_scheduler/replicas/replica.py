"""This replica among the others: what it publishes, and what it makes of what it receives."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from ..fleet.registry import Registry
from .message import MAX_BYTES, FleetKey, Ignored, Message, Unreadable
from .others import SILENT_S, Others
from .own import OwnWork
from .probes import Probes

__all__ = ["BATCH_S", "SILENT_S", "SUMMARY_S", "Replica"]

BATCH_S = 0.01
"""Least seconds between two messages: what happens meanwhile is told in one."""
SUMMARY_S = 1.0
"""Seconds between two summaries. They mend what was lost, and show that the replica lives."""

_log = logging.getLogger(__name__)


class Replica:
    """One of several schedulers of a fleet. It does no I/O and reads no clock.

    The caller sends what :meth:`publish` returns to all others, at the latest when :meth:`next_publish` says,
    and passes what it hears to :meth:`receive`. Times are the caller's own, of a monotonic clock; those of
    other machines do not matter.

    ``name`` is this process's, and no other's ever: a process that is started again has another one.
    """

    def __init__(self, registry: Registry, name: str, fleet: FleetKey) -> None:
        self.name = name
        self.ignored: Counter[Ignored] = Counter()
        """Messages that were not used, by reason."""
        self.received = 0
        """Messages of others that were used."""
        self.unsent = 0
        """Messages that would have been too long."""
        self._fleet = fleet
        self._others = Others(registry)
        self.probes = Probes(registry, name, lambda: self._others.names)
        """Says which instances this replica probes for all, and tells what it finds."""
        self._own = OwnWork(registry)
        self._number = 0
        self._published_at = self._summary_at = -1e9
        registry.journal = self._own

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called whenever there may be something to publish."""
        self._own.wake = self.probes.wake = wake

    @property
    def others(self) -> list[str]:
        """The replicas of which something was heard in the last seconds."""
        return self._others.names

    def silent_for(self, now: float) -> dict[str, float]:
        """Return for how many seconds nothing was heard of each of them."""
        return self._others.silent_for(now)

    @property
    def waiting_elsewhere(self) -> tuple[int, int]:
        """Requests that wait in the others' queues, for P and for D."""
        return self._others.waiting

    def next_publish(self, now: float) -> float:
        """Return when to call :meth:`publish` if nothing happens before."""
        if self._own.untold or self.probes.untold:
            return max(now, self._published_at + BATCH_S)
        return max(now, self._summary_at + SUMMARY_S)

    def publish(self, now: float, waiting: tuple[int, int] = (0, 0)) -> list[bytes]:
        """Return what to send to all others; nothing if nothing has happened and no summary is due.

        ``waiting`` are the requests in the queue, for P and for D. Replicas that were silent for long are
        forgotten.
        """
        self._others.forget_silent(now)
        messages = []
        changes = self._own.changes(self.name, self._number + 1, waiting)
        if self.probes.untold:
            nothing = Message(self.name, self._number + 1, False, waiting, [])
            changes = self.probes.add_to(nothing if changes is None else changes)
        if changes is not None:
            messages.append(self._encode(changes))
            self._published_at = now  # what others did is no news, and delays none
        if now >= self._summary_at + SUMMARY_S:
            messages.append(self.snapshot(now, waiting))
        return [each for each in messages if each]

    def snapshot(self, now: float, waiting: tuple[int, int] = (0, 0)) -> bytes:
        """Return all that this replica has, for one that joins."""
        self._summary_at = now
        return self._encode(self._own.summary(self.name, self._number + 1, waiting))

    def _encode(self, message: Message) -> bytes:
        self._number = message.number
        data = self._fleet.encode(message)
        if len(data) > MAX_BYTES:
            self.unsent += 1
            return b""
        return data

    def receive(self, data: bytes, now: float) -> bool:
        """Take in a message; return whether it was used. One of ours, which comes back, is not."""
        try:
            message = self._fleet.decode(data)
        except Unreadable as error:
            return self._ignore(error.reason)
        if message.replica == self.name:
            return False
        known = len(self._others.names)
        if (reason := self._others.receive(message, now)) is not None:
            return self._ignore(reason)
        self.received += 1
        if not self.probes.receive(message):
            self._ignore(Ignored.FINDING)
        if len(self._others.names) > known:
            self._summary_at = -1e9  # it must learn what we have
        return True

    def _ignore(self, reason: Ignored) -> bool:
        self.ignored[reason] += 1
        if self.ignored[reason] == 1:
            _log.warning("messages of replicas are ignored: %s (said once; see the count)", reason.value)
        return False
