"""A channel between replicas in memory: what one sends, the others receive at once."""

from __future__ import annotations

import asyncio

from vllm_pd_scheduler.sync.channel import (
    START,
    Change,
    Dropped,
    Listener,
    NotKept,
    Overtaken,
    Position,
    Traffic,
)


class Meeting:
    """Where fake channels meet: who is there, and the log."""

    def __init__(self) -> None:
        self.channels: list[FakeChannel] = []
        self.log: list[Change] = []
        self.appended = 0

    @property
    def newest(self) -> Position:
        return self.log[-1].position if self.log else START

    def empty(self) -> None:
        """Lose the log, as a server that is started again."""
        self.log = []

    def channel(self) -> FakeChannel:
        return FakeChannel(self)


class FakeChannel:
    """A :class:`~vllm_pd_scheduler.sync.channel.Channel` that is connected when the test says so."""

    def __init__(self, meeting: Meeting) -> None:
        self.traffic = Traffic()
        self.problem = "not connected yet"
        self.sent: list[bytes] = []
        self._meeting = meeting
        self._known: Position = START
        self._listener: Listener | None = None
        meeting.channels.append(self)

    def send(self, data: bytes) -> bool:
        if self.problem:
            self.traffic.dropped[Dropped.AWAY] += 1
            return False
        self.sent.append(data)
        for other in self._meeting.channels:
            if not other.problem and other is not self and other._listener is not None:
                other._listener.received(data)
        return True

    async def run(self, listener: Listener) -> None:
        self._listener = listener
        await asyncio.Event().wait()

    def connect(self) -> None:
        assert self._listener is not None
        log = self._meeting.log
        places = [each.position for each in log]
        known = places.index(self._known) + 1 if self._known in places else max(0, len(log) - 1)
        for change in log[known:] if log else [Change(START, b"")]:
            self._tell(change)
        self.problem = ""
        self._listener.connection("")

    def lose(self, problem: str = "it is gone") -> None:
        self.problem = problem
        if self._listener is not None:
            self._listener.connection(problem)

    async def append(self, data: bytes, expected: Position) -> Position:
        await asyncio.sleep(0)
        if self.problem:
            raise NotKept(self.problem)
        meeting = self._meeting
        if meeting.newest != expected:
            raise Overtaken
        meeting.appended += 1
        change = Change(str(meeting.appended), data)
        meeting.log.append(change)
        for each in meeting.channels:
            if not each.problem:
                each._tell(change)
        return change.position

    def _tell(self, change: Change) -> None:
        self._known = change.position
        if self._listener is not None:
            self._listener.changed(change)
