"""Runs the variants of a comparison side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from ..system.parent_death import die_with_parent
from .job import Job, Outcome, ReplayError

if TYPE_CHECKING:
    from .fleet import Variant

PoolProgress = Callable[[int, float, int], None]
"""Told a variant's place in the list, the rate of its run and how many requests of that have ended."""


def run_all(job: Job, variants: Sequence[Variant], processes: int, progress: PoolProgress) -> list[Outcome]:
    """Run ``job`` for each of ``variants``, so many at a time, and return what came of it, in their order.

    One process means this one. Raises :exc:`ReplayError` when a run is refused or its process dies; after
    that, as after Ctrl-C, no process is left.
    """
    processes = min(processes, len(variants))
    if processes <= 1:
        return [job.run(variant, partial(progress, index)) for index, variant in enumerate(variants)]
    outcomes: dict[int, Outcome] = {}
    children: dict[Connection, _Child] = {}
    try:
        while len(outcomes) < len(variants):
            while len(children) < processes and len(outcomes) + len(children) < len(variants):
                child = _Child(len(outcomes) + len(children), job, variants)
                children[child.receiver] = child
            for ready in wait(list(children)):
                child = children[ready]  # type: ignore[index]
                message = child.receive()
                if isinstance(message, Outcome):
                    outcomes[child.index] = message
                    del children[child.receiver]
                    child.process.join()
                else:
                    progress(child.index, *message)
    finally:
        for child in children.values():
            child.process.terminate()
        for child in children.values():
            child.process.join()
    return [outcomes[index] for index in range(len(variants))]


class _Child:
    """A process that runs the variant at ``index``."""

    def __init__(self, index: int, job: Job, variants: Sequence[Variant]) -> None:
        # Spawned, not forked: a fork would copy other threads' locks as they happen to be.
        context = multiprocessing.get_context("spawn")
        self.index = index
        self._label = variants[index].label
        self.receiver, sender = context.Pipe(duplex=False)
        arguments = (job, variants[index], sender, os.getpid())
        self.process: BaseProcess = context.Process(target=_run, args=arguments, daemon=True)
        with _interrupts_held_back():
            self.process.start()
        sender.close()  # else its end would not be seen

    def receive(self) -> tuple[float, int] | Outcome:
        """Return how far it is, or what came of it. Raises :exc:`ReplayError` if it failed or died."""
        try:
            message: tuple[float, int] | Outcome | ReplayError = self.receiver.recv()
        except EOFError:
            self.process.join()
            raise ReplayError(self._end()) from None
        if isinstance(message, ReplayError):
            raise message
        return message

    def _end(self) -> str:
        status = self.process.exitcode or 0
        if status == -signal.SIGKILL:
            return f"{self._label}: its process was killed; if memory ran out, give --limit or fewer --jobs"
        return f"{self._label}: its process ended with status {status}"


def _run(job: Job, variant: Variant, sender: Connection, parent: int) -> None:
    die_with_parent(parent)
    try:
        sender.send(job.run(variant, lambda rate, finished: sender.send((rate, finished))))
    except ReplayError as error:
        sender.send(error)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start a process that never sees Ctrl-C: the terminal sends it to all, and one answer is enough.

    A signal that is blocked stays so in a child, even while it is still importing.
    """
    resource_tracker.ensure_running()  # which would undo it, were it started with the process
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
