"""The parent of workers: starts several schedulers as processes, and again what has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from ..sync.hub import Hub

log = logging.getLogger(__name__)

STEADY_S = 10.0
"""A worker that has run for longer is started again at once."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
"""Before one is started again that ends soon after its start, each time."""
HUNG_S = 6.0
"""A worker that gives no sign of life for so long is ended: Envoy waits half as long for it."""
START_S = 120.0
"""How long a worker gets for its start until its first sign of life: many times what a large fleet takes."""
LOOK_S = 1.0
"""Seconds between two looks at that."""
STOP_S = 5.0
"""How long workers get to end before they are killed."""


class WorkerEnded(Exception):
    """A worker has ended before it served; ``status`` is its exit status. It has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a worker ended with status {status} at its start")
        self.status = status


class Workers:
    """Several schedulers, as processes that end with this one at the latest.

    ``async with Workers(count, command, path) as workers`` starts them and waits until all serve. ``command``
    is what runs one: ``--worker INDEX`` is appended. ``path`` is where the socket is made over which they
    talk. Raise :exc:`WorkerEnded` if one cannot start. One that ends later is started again.
    """

    def __init__(self, count: int, command: Sequence[str], path: str) -> None:
        self._count = count
        self._command = command
        self._path = path
        self._serves = {f"w{index}": asyncio.Event() for index in range(count)}
        self._hub = Hub(self._ready, self._alive, self._has_drained)
        self._drained: set[str] = set()
        self._looks: dict[str, int] = {}
        """For how many looks each worker has given no sign of life."""
        self._lives: set[str] = set()
        """Those that have given the first."""
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._starting: dict[str, bool] = {}
        """Those that do not serve yet, and whether all were told to read the configuration again since. A
        process that has just begun does not know the signal for that, and would end of it."""
        self._keeping: list[asyncio.Task[None]] = []
        self._ending = False

    async def __aenter__(self) -> Workers:
        try:
            await self._hub.start(self._path)
            self._keeping.append(asyncio.ensure_future(self._watch()))
            await self._start([0])  # it says what is wrong with the configuration, once
            await self._start(range(1, self._count))
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the workers that run, by name."""
        return {f"w{index}": each.pid for index, each in self._processes.items()}

    async def _start(self, indices: Sequence[int] | range) -> None:
        """Start workers, and wait until they serve; raise what :meth:`_keep` raises."""
        keeping = [asyncio.ensure_future(self._keep(index)) for index in indices]
        self._keeping += keeping
        serving = [asyncio.ensure_future(self._serves[f"w{index}"].wait()) for index in indices]
        all_serve = asyncio.gather(*serving)
        try:
            futures: list[asyncio.Future[Any]] = [all_serve, *keeping]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            for each in keeping:
                if each.done():
                    each.result()
        finally:
            for waiting in serving:
                waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await all_serve

    async def _keep(self, index: int) -> None:
        """Run one worker, and another one in its place when it has ended, until all end."""
        pause = 0.0
        name, clock = f"w{index}", asyncio.get_running_loop().time
        while not self._ending:
            began = clock()
            self._starting[name] = False
            self._looks[name] = 0
            self._lives.discard(name)
            try:
                process = self._processes[index] = await asyncio.create_subprocess_exec(
                    *self._command,
                    *("--worker", str(index)),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # so that a Ctrl-C reaches the parent alone, which passes it on
                )
            except OSError as error:
                why, again = error.strerror, LONGEST_PAUSE_S
                log.error("no worker can be started: %s; it is tried again in %g s", why, again)
                await asyncio.sleep(again)
                continue
            if self._ending:  # meanwhile
                process.kill()
            status = await process.wait()
            del self._processes[index]
            self._let_go()
            if self._ending:
                return
            if not self._serves[name].is_set():
                raise WorkerEnded(status)
            steady = clock() - began > STEADY_S
            pause = 0.0 if steady else min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * pause))
            later = f" in {pause:g} s" if pause else ""
            log.error(
                "worker %s (process %d) %s: starting it again%s", name, process.pid, _how(status), later
            )
            await asyncio.sleep(pause)

    def _ready(self, name: str) -> None:
        """Note that a worker serves, and send it the SIGHUP that came meanwhile."""
        if name not in self._serves:
            return
        self._serves[name].set()
        process = self._processes.get(int(name.removeprefix("w")))
        if self._starting.pop(name, False) and process is not None:
            _send(process, signal.SIGHUP)

    def _has_drained(self, name: str) -> None:
        """Note that a worker has no request any more; all leave when all have none."""
        if self._ending:
            self._drained.add(name)
            self._let_go()
        else:  # somebody has ended this one alone: Envoy asks the others
            self._hub.let_go()

    def _let_go(self) -> None:
        if self._ending and self._drained.issuperset(f"w{index}" for index in self._processes):
            self._hub.let_go()

    def _alive(self, name: str) -> None:
        """Note a sign of a worker's life."""
        self._looks[name] = 0
        self._lives.add(name)

    async def _watch(self) -> None:
        """End workers that hang: each is started again, as one that has died.

        Looks are counted and not seconds, so that a parent that stood still itself hears all of them first.
        """
        while True:
            await asyncio.sleep(LOOK_S)
            for name in self._looks:
                self._looks[name] += 1
                process = self._processes.get(int(name.removeprefix("w")))
                limit = HUNG_S if name in self._lives else START_S
                if self._looks[name] * LOOK_S > limit and process is not None:
                    log.error("worker %s (process %d) hangs: it is ended", name, process.pid)
                    self._looks[name] = 0
                    _send(process, signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to all workers; SIGHUP to one that starts when it serves."""
        if number in (signal.SIGTERM, signal.SIGINT):
            self._ending = True
        for index, process in tuple(self._processes.items()):
            if number == signal.SIGHUP and f"w{index}" in self._starting:
                self._starting[f"w{index}"] = True
            else:
                _send(process, number)

    async def ended(self) -> None:
        """Wait until all workers have ended, after a signal for that."""
        await asyncio.gather(*(each.wait() for each in tuple(self._processes.values())))

    async def stop(self) -> None:
        """End all workers, by force those that do not end."""
        self._ending = True
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGINT)  # a second one means: do not drain; of one kind both might come as one
        try:
            async with asyncio.timeout(STOP_S):
                await self.ended()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.ended()
        for each in self._keeping:
            each.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await self._hub.stop()


def _send(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def worker_command(arguments: Sequence[str]) -> list[str]:
    """Return what runs a worker of this process with arguments of the command ``worker``."""
    return [sys.executable, "-m", "vllm_pd_scheduler", "worker", *arguments, "--parent", str(os.getpid())]


def automatic_count() -> int:
    """Return how many workers suit this machine: one for each four cores.

    Envoy has the others. An answer of a hundred tokens takes it some three times the CPU that its request
    takes a worker.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // 4)
