"""Runs an `Engine` in real time: a loop that steps it, transfers that feed it, streams that read it."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from .engine import Engine, EngineRequest, Fetch, HandOff, Step
from .handoff import Connector, FatalHandOff, FetchCall, FetchReply, Offer, TransferFailed
from .metrics import Metrics
from .text import Answer, Prompt


class EngineFailed(Exception):
    """The engine could not finish a request: its KV did not come, or the engine itself is dead."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a choice: its text, and the finish reason ("stop" or "length") with the last."""

    choice: int
    text: str
    finish_reason: str | None


@dataclass(slots=True)
class Job:
    """One choice of an HTTP request. `offer` is the hand-off to fetch, if there is one to fetch."""

    request: EngineRequest
    prompt: Prompt
    choice: int
    finish_reason: str
    answer: Answer
    offer: Offer | None = None
    remote_cached: int | None = None
    """Prompt tokens that the sender of the hand-off had in its cache, if it said so."""
    note: Callable[[str], None] = lambda outcome: None
    """Told what became of the hand-off."""
    stream: "asyncio.Queue[Token | EngineFailed]" = field(default_factory=asyncio.Queue)
    loading: "asyncio.Task[None] | None" = None
    last_token: float = 0.0

    @property
    def cached(self) -> int:
        """Cached prompt tokens as vLLM tells a client: where the prompt was computed, be it elsewhere."""
        return self.request.cached if self.remote_cached is None else self.remote_cached


class Worker:
    """The engine's process. `on_death` is called soon after the engine has died of a bad hand-off."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        connector: Connector,
        *,
        engine_id: str,
        agent: str,
        recompute: bool = False,
        fail_delay: float = 0.5,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self.engine_id = engine_id
        self.dead: str | None = None
        self.hand_offs: Counter[str] = Counter()
        """Hand-offs by what became of them: of those sent fetched, released or expired, of those received
        good, stale, failed, recomputed or released."""
        self._metrics = metrics
        self._connector = connector
        self._agent = agent
        self._recompute = recompute
        self._fail_delay = fail_delay
        self._on_death = on_death
        self._jobs: dict[str, Job] = {}
        self._digests: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what the HTTP side calls ---------------------------------------------------------------------

    async def run(self) -> None:
        """Step the engine for ever."""
        while not self.dead:
            self._wake.clear()
            now = time.monotonic()
            step = self.engine.step(now)
            for request in step.transfers:
                self._load(self._jobs[request.request_id])
            self._expired(step.expired)
            self._metrics.preempted(len(step.preempted))
            if step.idle:
                await self._rest(now)
            else:
                await asyncio.sleep(step.duration)
                self._deliver(step, now + step.duration)

    async def generate(self, jobs: list[Job]) -> AsyncGenerator[Token, None]:
        """Run the choices of one request and yield their tokens as they come.

        Raise EngineFailed when one cannot be finished. Leaving the iteration early aborts them.
        """
        stream = jobs[0].stream
        left = len(jobs)
        try:
            for job in jobs:
                job.stream = stream
                self._submit(job)
            while left:
                token = await stream.get()
                if isinstance(token, EngineFailed):
                    raise token
                left -= token.finish_reason is not None
                yield token
        finally:
            for job in jobs:
                self._drop(job)

    def release(self, offer: Offer) -> None:
        """Tell the sender of a hand-off, in the background, that nobody will fetch it."""
        self._spawn(self._connector.release(offer))

    def serve_fetch(self, call: FetchCall) -> FetchReply | None:
        """Answer another engine's fetch; None when it does not mean this engine."""
        if call.engine_id != self.engine_id or call.agent not in (None, self._agent) or self.dead:
            return None
        self.observe()
        found = self.engine.fetch(call.request_id, call.block_ids, time.monotonic())
        if found is Fetch.INVALID:
            return FetchReply(self._agent, invalid=True)
        digest = self._forget(call.request_id, "fetched")
        self._wake.set()
        return FetchReply(self._agent, digest if found is Fetch.GOOD else None)

    def serve_release(self, call: FetchCall) -> None:
        """Unpin a hand-off that nobody will fetch."""
        if call.engine_id == self.engine_id and self.engine.release(call.request_id):
            self._forget(call.request_id, "released")
            self._wake.set()

    def observe(self) -> None:
        """Bring leases up to date before somebody looks at the engine."""
        self._expired(self.engine.expire(time.monotonic()))

    def die(self, reason: str) -> None:
        """End the engine as a real one ends: its requests fail, then the process goes."""
        if self.dead:
            return
        self.dead = reason
        print(f"EngineCore died: {reason}", file=sys.stderr, flush=True)
        for job in self._jobs.values():
            job.stream.put_nowait(self._death())
        self._wake.set()
        asyncio.get_running_loop().call_later(0.2, self._on_death)

    async def close(self) -> None:
        """Cancel what still runs in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- requests -------------------------------------------------------------------------------------

    def _submit(self, job: Job) -> None:
        if self.dead:
            raise self._death()
        self.engine.add(job.request, time.monotonic())
        self._jobs[job.request.request_id] = job
        if job.request.hand_off is HandOff.SEND:
            self._digests[job.request.request_id] = job.prompt.digest
        self._wake.set()

    def _drop(self, job: Job) -> None:
        """Forget a job; if it has not ended, abort it and let go of the blocks it would have fetched."""
        request_id = job.request.request_id
        if self._jobs.pop(request_id, None) is None:
            return
        self._digests.pop(request_id, None)
        if job.loading and not job.loading.done():
            job.loading.cancel()
        if self.engine.abort(request_id):
            self._metrics.finished(job.request, "abort")
            self._wake.set()
        if job.request.hand_off is HandOff.RECEIVE and not job.request.remote:
            if job.offer:
                self._received(job, "released")
                self.release(job.offer)
            elif not self.dead:
                self.die(f"hand-off of {request_id} without a sender")

    def _deliver(self, step: Step, end: float) -> None:
        for output in step.outputs:
            request = output.request
            job = self._jobs.get(request.request_id)
            if job is None:
                continue
            if output.index == 0 and job.offer is None:
                self._metrics.prefilled(request.prompt_tokens - request.cached, remote=False)
            self._metrics.token(request, end - job.last_token if output.index else None)
            job.last_token = end
            reason = job.finish_reason if output.finished else None
            if reason:
                # The request is over, though its blocks may stay pinned: nothing is left to abort.
                del self._jobs[request.request_id]
                self._metrics.finished(request, reason)
            job.stream.put_nowait(Token(job.choice, job.answer.word(output.index), reason))

    async def _rest(self, now: float) -> None:
        expiry = self.engine.next_expiry()
        try:
            async with asyncio.timeout(None if expiry is None else max(0.0, expiry - now)):
                await self._wake.wait()
        except TimeoutError:
            pass

    # -- transfers ------------------------------------------------------------------------------------

    def _load(self, job: Job) -> None:
        # Without a sender's address nothing ever arrives, and the request hangs until its client leaves.
        if job.offer:
            job.loading = self._spawn(self._transfer(job, job.offer))

    async def _transfer(self, job: Job, offer: Offer) -> None:
        request = job.request
        seconds = self.engine.profile.transfer_time(request.transfer_tokens)
        self._metrics.transfer_begun(request.transfer_tokens)
        await asyncio.sleep(seconds)
        try:
            digest = await self._connector.fetch(offer)
        except FatalHandOff as error:
            self.die(str(error))
            return
        except TransferFailed as error:
            await asyncio.sleep(self._fail_delay)
            self._transfer_failed(job, error)
            return
        if digest != job.prompt.digest:
            job.answer = Answer(job.prompt, job.choice, spoilt=True)
        self._received(job, "good" if digest == job.prompt.digest else "stale")
        self._metrics.transferred(request.transfer_tokens, seconds)
        self._metrics.prefilled(request.transfer_tokens, remote=True)
        self.engine.transfer_done(request.request_id)
        self._wake.set()

    def _transfer_failed(self, job: Job, error: TransferFailed) -> None:
        self._received(job, "recomputed" if self._recompute else "failed")
        job.offer = None
        self._metrics.transfer_failed()
        self.engine.transfer_failed(job.request.request_id, recompute=self._recompute)
        self._wake.set()
        if not self._recompute:
            self._metrics.finished(job.request, "error")
            del self._jobs[job.request.request_id]
            job.stream.put_nowait(EngineFailed("Internal server error"))

    def _expired(self, request_ids: list[str]) -> None:
        self._metrics.expired(len(request_ids))
        for request_id in request_ids:
            self._forget(request_id, "expired")

    def _forget(self, request_id: str, outcome: str) -> str | None:
        digest = self._digests.pop(request_id, None)
        if digest:
            self.hand_offs[outcome] += 1
        return digest

    def _received(self, job: Job, outcome: str) -> None:
        job.note(outcome)
        self.hand_offs[outcome] += 1

    def _death(self) -> EngineFailed:
        return EngineFailed("EngineCore encountered an issue. See stack trace (above) for the root cause.")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
