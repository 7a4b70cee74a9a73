"""This replica among the others: what it publishes, and what it makes of what it receives."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from ..fleet.registry import Registry
from .directory import Directory
from .message import MAX_BYTES, Ask, Disbelieved, FleetKey, Ignored, Message, Unreadable
from .names import Names
from .others import SILENT_S, Others
from .own import OwnWork
from .probes import Probes

__all__ = ["AT_ONCE", "BATCH_S", "SILENT_S", "SUMMARY_S", "Replica"]

BATCH_S = 0.01
"""Mean seconds between two messages at least: what happens meanwhile is told in one."""
AT_ONCE = 8
"""Messages that may follow each other without a pause where there were few before: a choice.

A claim that is told at once is known sooner to those that might choose the same P.
"""
SAID_FROM = 20
"""Claims of a kind that are not believed before that is said: a few can be by chance."""
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
        self._directory = Directory(registry)
        self._own = OwnWork(registry, self._directory)
        self._others = Others(name, registry, self._directory, self._own)
        self.probes = Probes(self._directory, registry, name, lambda: self._others.names)
        """Says which instances this replica probes for all, and tells what it finds."""
        self._disbelieved_said: set[Disbelieved] = set()
        self._number = 0
        self._may_publish_at = self._summary_at = -1e9
        registry.journal = self._own

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called whenever there may be something to publish."""
        self._own.wake = self.probes.wake = wake

    @property
    def others(self) -> list[str]:
        """The replicas of which something was heard in the last seconds."""
        return self._others.names

    @property
    def others_changes(self) -> int:
        """How often one of them came or went."""
        return self._others.changes

    def silent_for(self, now: float) -> dict[str, float]:
        """Return for how many seconds nothing was heard of each of them."""
        return self._others.silent_for(now)

    @property
    def disbelieved(self) -> Counter[Disbelieved]:
        """Claims in messages that were used, which were not believed or not in full, by kind."""
        return self._others.disbelieved

    @property
    def missing(self) -> int:
        """Endpoints of which this replica, which has just joined, does not know what is cached there."""
        return self._others.joining.missing

    @property
    def waiting_elsewhere(self) -> tuple[int, int]:
        """Requests that wait in the others' queues, for P and for D."""
        return self._others.waiting

    def next_publish(self, now: float) -> float:
        """Return when to call :meth:`publish` if nothing happens before."""
        joining, soon = self._others.joining, self._may_publish_at
        times = [self._summary_at + SUMMARY_S]
        if self._own.untold or self.probes.untold or joining.has_gaps:
            times.append(soon)
        if joining.wants or self._own.answers.wanted:
            for due in (joining.due(now), self._own.answers.due(now)):
                if due is not None:
                    times.append(max(soon, due))
        return max(now, min(times))

    @property
    def must_tell(self) -> bool:
        """Whether what others have told makes this one ask or answer something, or tell all that it has."""
        joining = self._others.joining
        return joining.wants or self._own.answers.wanted or self._summary_at < 0.0

    def publish(self, now: float, waiting: tuple[int, int] = (0, 0)) -> list[bytes]:
        """Return what to send to all others; nothing if nothing has happened and no summary is due.

        ``waiting`` are the requests in the queue, for P and for D. Replicas that were silent for long are
        forgotten.
        """
        self._others.forget_silent(now)
        messages = []
        names = Names(self._directory)
        asks = self._asks(names, now) if self._others.joining.wants else []
        changes = self._own.changes(self.name, self._number + 1, waiting, now, asks, names)
        if self.probes.untold:
            if changes is None:
                changes = Message(self.name, self._number + 1, False, waiting, names.names)
            changes = self.probes.add_to(changes, names.place)
        if changes is not None:
            messages.append(self._encode(changes))
            # What others did is no news, and delays none.
            self._may_publish_at = max(self._may_publish_at, now - (AT_ONCE - 1) * BATCH_S) + BATCH_S
        if now >= self._summary_at + SUMMARY_S:
            messages.append(self.snapshot(now, waiting))
        return [each for each in messages if each]

    def snapshot(self, now: float, waiting: tuple[int, int] = (0, 0)) -> bytes:
        """Return all that this replica has, for one that joins.

        It has loads, ejections and pairs that stand, what is queued, what was learned. What is cached where
        is too much for one message: who joins asks one of the others for it, some endpoints at a time.
        """
        self._summary_at = now
        return self._encode(self._own.summary(self.name, self._number + 1, waiting))

    def tell_all(self) -> None:
        """Have :meth:`publish` tell all that this replica has the next time: somebody must learn it."""
        self._summary_at = -1e9

    def _asks(self, names: Names, now: float) -> list[Ask]:
        joining = self._others.joining
        asks = joining.gaps()
        for name, endpoints, first in joining.asks(now):
            asks.append(Ask(name, endpoints=[names.place(each) for each in endpoints], rates=first))
        return asks

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
        known = self._others.changes
        self._own.deaf = True
        try:
            reason = self._others.receive(message, now)
            if reason is None and not self.probes.receive(message):
                self.disbelieved[Disbelieved.FINDINGS] += 1
        finally:
            self._own.deaf = False
        if reason is not None:
            return self._ignore(reason)
        self.received += 1
        if len(self.disbelieved) > len(self._disbelieved_said):
            self._say_disbelieved(message.replica)
        if self._others.changes != known:  # one has come
            self.tell_all()
        return True

    def _say_disbelieved(self, name: str) -> None:
        for kind, count in self.disbelieved.items():
            if count >= SAID_FROM and kind not in self._disbelieved_said:
                self._disbelieved_said.add(kind)
                _log.warning(
                    "replica %s, or one before it, claims what cannot be: %s (said once; see the count)",
                    name,
                    kind,
                )

    def _ignore(self, reason: Ignored) -> bool:
        self.ignored[reason] += 1
        if self.ignored[reason] == 1:
            _log.warning("messages of replicas are ignored: %s (said once; see the count)", reason.value)
        return False
