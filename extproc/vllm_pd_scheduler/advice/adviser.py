"""Gives advice on the numbers of P and D, off the event loop: the replay runs in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from ..router import PDRouter
from .observation import Observation, Unknown, observe
from .question import Answer, Size
from .seen import Seen
from .verdict import Advice, Kind, judge

CPU_S = 20.0
"""CPU time that the replays of one advice may take."""
WALL_S = 180.0
"""Seconds after which the process is ended: others that want the CPU go first."""
FRESH_S = 30.0
"""Seconds for which an advice is given again: the traffic is hardly another."""
_LINE_REQUESTS = 100
"""Requests that are written at once, in less than a millisecond."""
_MOST_ERROR = 500


class Adviser:
    """Advises on one fleet; ``clock`` returns the monotonic seconds of its requests.

    One question is worked on at a time. An advice is given again to who asks the same within ``FRESH_S``.
    ``others`` returns what the other workers have seen since a time.
    """

    def __init__(
        self,
        router: PDRouter,
        clock: Callable[[], float],
        cpu_seconds: float = CPU_S,
        others: Callable[[float], Awaitable[Sequence[Seen]]] | None = None,
    ) -> None:
        self._router = router
        self._clock = clock
        self._cpu_seconds = cpu_seconds
        self._others = others
        self._turn = asyncio.Lock()
        self._last: tuple[float, tuple[float, Size | None], Advice] | None = None

    async def advise(self, seconds: float, asked: Size | None = None) -> Advice:
        """Return what is advised by the requests of the last ``seconds``.

        ``asked`` is another fleet that is to be among those compared.
        """
        async with self._turn:
            now, asks = self._clock(), (seconds, asked)
            if self._last is not None and self._last[1] == asks and now - self._last[0] < FRESH_S:
                return self._last[2]
            advice = await self._worked_out(now - seconds, asked)
            if advice.kind is not Kind.UNKNOWN:
                self._last = now, asks, advice
            return advice

    async def _worked_out(self, since: float, asked: Size | None) -> Advice:
        others = await self._others(since) if self._others is not None else ()
        try:
            observation = observe(self._router, since, asked, self._cpu_seconds, others)
        except Unknown as unknown:
            return Advice(Kind.UNKNOWN, str(unknown))
        try:
            answer = await _rehearsed(observation)
        except Unknown as unknown:
            return Advice(Kind.UNKNOWN, str(unknown), observation=observation)
        return judge(observation, answer)


async def _rehearsed(observation: Observation) -> Answer:
    """Return what a process of its own answers; raise :exc:`Unknown` if it fails."""
    arguments = sys.executable, "-m", "vllm_pd_scheduler.advice", str(os.getpid())
    try:
        process = await asyncio.create_subprocess_exec(*arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    except OSError as error:
        raise Unknown(f"no process can be started: {error.strerror}") from None
    try:
        async with asyncio.timeout(WALL_S):
            (text, errors), _ = await asyncio.gather(_read(process), _write(process, observation))
            status = await process.wait()
    except TimeoutError:
        raise Unknown("the replay takes too long: this machine has no CPU to spare") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if status:
        lines = errors.decode(errors="replace").strip().splitlines()
        reason = lines[-1][:_MOST_ERROR] if lines else f"its process has ended with status {status}"
        raise Unknown(f"the replay has failed: {reason}")
    return msgspec.json.decode(text, type=Answer)


async def _read(process: Process) -> tuple[bytes, bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    text, errors = await asyncio.gather(process.stdout.read(), process.stderr.read())
    return text, errors


async def _write(process: Process, observation: Observation) -> None:
    """Write the question and the requests, in turns with all else that the event loop does."""
    stdin = process.stdin
    assert stdin is not None
    with contextlib.suppress(ConnectionError):  # it has ended: its status says why
        stdin.write(msgspec.json.encode(observation.question) + b"\n")
        for at in range(0, len(observation.replayed), _LINE_REQUESTS):
            stdin.write(msgspec.json.encode(observation.replayed[at : at + _LINE_REQUESTS]) + b"\n")
            await stdin.drain()
            await asyncio.sleep(0)
    stdin.close()
