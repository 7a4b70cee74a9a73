"""Runs the variants of a comparison in parallel, each in its own process."""

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
    from .variant import Variant

PoolProgress = Callable[[int, float, int], None]
"""Called with a variant's index, the rate of its run and the number of requests that have ended."""


def run_all(job: Job, variants: Sequence[Variant], processes: int, progress: PoolProgress) -> list[Outcome]:
    """Run a job for each variant, in up to ``processes`` processes, and return the outcomes in their order.

    With one process it is done in this one. Raise :exc:`ReplayError` if a run fails or its process dies.
    After an exception, Ctrl-C included, no process is left.
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
    """A process that runs the variant at ``index`` and sends its progress and outcome."""

    def __init__(self, index: int, job: Job, variants: Sequence[Variant]) -> None:
        # Spawned, not forked: a fork copies locks that other threads hold at that moment, and nobody would
        # release them in the child.
        context = multiprocessing.get_context("spawn")
        self.index = index
        self._label = variants[index].label
        self.receiver, sender = context.Pipe(duplex=False)
        arguments = (job, variants[index], sender, os.getpid())
        self.process: BaseProcess = context.Process(target=_run, args=arguments, daemon=True)
        with _interrupts_blocked():
            self.process.start()
        sender.close()  # while this process has it open, recv() would not see the child's end

    def receive(self) -> tuple[float, int] | Outcome:
        """Return progress or the outcome; raise :exc:`ReplayError` if the run failed or the process died."""
        try:
            message: tuple[float, int] | Outcome | ReplayError = self.receiver.recv()
        except EOFError:
            self.process.join()
            raise ReplayError(self._exit_reason()) from None
        if isinstance(message, ReplayError):
            raise message
        return message

    def _exit_reason(self) -> str:
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
def _interrupts_blocked() -> Iterator[None]:
    """Return a context in which a process is started that never sees Ctrl-C.

    The terminal sends SIGINT to all processes, and this one ends the others. A child inherits that a signal
    is blocked, so it is blocked even while the child still imports.
    """
    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts: start it before the child does
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
