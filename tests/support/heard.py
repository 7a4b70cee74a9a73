"""What the listener of a channel is told."""

from __future__ import annotations

from vllm_pd_scheduler.sync.channel import Change


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.changes: list[Change] = []
        self.problems: list[str] = []

    def received(self, data: bytes) -> None:
        self.messages.append(data)

    def changed(self, change: Change) -> None:
        self.changes.append(change)

    def connection(self, problem: str) -> None:
        self.problems.append(problem)
