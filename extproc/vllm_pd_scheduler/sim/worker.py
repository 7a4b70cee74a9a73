"""Runs an ``Engine`` in real time: a loop of steps, KV transfers, and the token streams of requests."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from .ascend_layerwise import LayerwiseConnector, PushCall, external_id
from .engine import Engine, HandOff, Step
from .faults import Fault
from .handoff import Connector, FatalHandOff, FetchCall, FetchReply, TransferFailed
from .job import EngineFailed, Job, Token
from .lending import Lending
from .metrics import Metrics
from .mooncake import PullCall
from .offloading import OffloadingConnector, P2pFetch
from .text import Answer

if TYPE_CHECKING:
    from .kv_events import Publisher


class Worker:
    """Drives an engine and delivers the tokens of its requests.

    - ``agent`` identifies this process to other engines.
    - ``recompute``: prefill a request here if its KV does not come; else it fails.
    - ``fail_delay``: seconds until a transfer from a dead sender fails.
    - ``on_death`` is called soon after the engine has died of a bad hand-off.
    """

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
        """Why the engine has died; None while it lives."""
        self.hand_offs: Counter[str] = Counter()
        """Hand-offs by outcome: fetched, released or expired if sent; good, stale, failed, recomputed or
        released if received."""
        self.connector = connector
        self.fault = Fault()
        """What a test has ordered of its transfers."""
        self.metrics = metrics
        self.publisher: Publisher | None = None
        """Who publishes its KV events, if anybody does."""
        self._wrong: set[int] = set()
        """Hashes of cached blocks that have come wrong."""
        self._agent = agent
        self._recompute = recompute
        self._fail_delay = fail_delay
        self._on_death = on_death
        self._jobs: dict[str, Job] = {}
        self._wake = asyncio.Event()
        self.lending = Lending(engine, connector, metrics, agent, self.hand_offs, self._wake)
        """What it has prefilled for other engines."""
        self._steps = asyncio.Event()
        """Whether the engine makes steps."""
        self._steps.set()
        self._aborted: list[Job] = []
        self._left: dict[str, Job] = {}
        """Whose clients have left and whose blocks others may write to, by the id for those."""
        self._tasks: set[asyncio.Task[None]] = set()

    # -- called by the HTTP server ---------------------------------------------------------------------

    async def run(self) -> None:
        """Step the engine until it dies or the task is cancelled."""
        while not self.dead:
            await self._steps.wait()
            self._wake.clear()
            now = time.monotonic()
            step = self.engine.step(now)
            for request in step.transfers:
                self._start_transfer(self._jobs[request.request_id])
            self.lending.expired(step.expired)
            self.metrics.preempted(len(step.preempted))
            if step.idle:
                await self._wait_for_work(now)
            else:
                await asyncio.sleep(step.duration)
                self._deliver(step, now + step.duration)

    async def generate(self, jobs: list[Job]) -> AsyncGenerator[Token, None]:
        """Run the choices of one request and yield their tokens as they come.

        Raise EngineFailed if one cannot be finished. Closing the generator early aborts all of them.
        """
        stream = jobs[0].stream
        unfinished = len(jobs)
        try:
            for job in jobs:
                job.stream = stream
                await self._pull(job)
                self._submit(job)
            while unfinished:
                token = await stream.get()
                if isinstance(token, EngineFailed):
                    raise token
                unfinished -= token.finish_reason is not None
                yield token
        finally:
            for job in jobs:
                self._drop(job)

    def abort(self, job: Job) -> None:
        """End a job as its client asks: with an error, or as it is if it has begun to answer."""
        request = job.request
        if self.lending.abort(request.request_id):
            return
        if request.request_id in self._jobs:
            if request.generated and request.hand_off is not HandOff.SEND:
                job.finish_reason = "abort"
                job.stream.put_nowait(Token(job.choice, "", "abort"))
            else:
                job.stream.put_nowait(EngineFailed("Aborted by AbortReq."))

    def release(self, offer: Any) -> None:
        """Tell a hand-off's sender, in the background, that nobody will fetch it."""
        self._spawn(self.connector.release(offer))

    def serve_fetch(self, call: FetchCall) -> FetchReply | None:
        """Return the answer to another engine's fetch; None if it is meant for another process."""
        if call.engine_id != self.engine_id or self.dead:
            return None
        self.observe()
        return self.lending.fetch(call)

    async def serve_pull(self, call: PullCall) -> FetchReply | None:
        """Return the answer to a pull, as soon as there is a hand-off of its name; None as above."""
        if call.engine_id != self.engine_id or self.dead:
            return None
        self.observe()
        return await self.lending.pull(call)

    def serve_push(self, call: PushCall) -> None:
        """Take blocks that another engine has written: those of a request, or whoever has them now."""
        connector = self.connector
        if isinstance(connector, LayerwiseConnector) and connector.take(call):
            if (left := self._left.pop(call.request_id, None)) is not None:
                self._record_hand_off(left, "released")
                self.engine.abort(left.request.request_id)
                self._wake.set()
            return
        for job in self._jobs.values():
            if set(self.engine.pool.blocks(job.request.request_id)) & set(call.block_ids):
                job.answer = Answer(job.prompt, job.choice, wrong_kv=True)
                self._record_hand_off(job, "stale")

    async def serve_p2p(self, call: P2pFetch) -> FetchReply | None:
        """Return the answer to a fetch of a copy that was kept, as soon as there is one."""
        if self.dead or not isinstance(self.connector, OffloadingConnector):
            return None
        return await self.connector.serve(call, self._agent)

    def serve_release(self, call: FetchCall) -> None:
        """Unpin a hand-off of this engine that nobody will fetch."""
        if call.engine_id == self.engine_id:
            self.lending.release(call.request_id)

    def stick(self, stuck: bool) -> None:
        """Let the engine do nothing more, not even drop what clients abort, or let it go on."""
        if stuck:
            self._steps.clear()
            return
        self._steps.set()
        aborted, self._aborted = self._aborted, []
        for job in aborted:
            self._drop(job)

    def observe(self) -> None:
        """End the leases that are over: call it before the engine's state is read."""
        self.lending.expired(self.engine.expire(time.monotonic()))

    def die(self, reason: str) -> None:
        """Kill the engine as a real one dies: its requests fail, and the process ends soon after."""
        if self.dead:
            return
        self.dead = reason
        print(f"EngineCore died: {reason}", file=sys.stderr, flush=True)
        for job in self._jobs.values():
            job.stream.put_nowait(self._death_error())
        self._wake.set()
        asyncio.get_running_loop().call_later(0.2, self._on_death)

    async def close(self) -> None:
        """Cancel the background tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- requests -------------------------------------------------------------------------------------

    def _submit(self, job: Job) -> None:
        if self.dead:
            raise self._death_error()
        self.engine.add(job.request, time.monotonic())
        self._jobs[job.request.request_id] = job
        self.lending.begin(job)
        self._wake.set()

    def _drop(self, job: Job) -> None:
        """Remove a job. If it has not ended, abort it and release the hand-off that it would have fetched."""
        if not self._steps.is_set():
            self._aborted.append(job)
            return
        request_id = job.request.request_id
        if self._jobs.pop(request_id, None) is None:
            return
        self.lending.drop(request_id)
        if job.loading and not job.loading.done():
            job.loading.cancel()
            if self.connector.awaits_push and not self.dead:
                self._left[external_id(request_id)] = job
                self.metrics.finished(job.request, "abort")
                return
        if self.engine.abort(request_id):
            self.metrics.finished(job.request, "abort")
            self._wake.set()
        if job.request.hand_off is HandOff.RECEIVE and not job.request.transfer_ended:
            if self.connector.pushes:
                pass  # the sender hears nothing, and pushes or waits for its lease
            elif job.offer:
                self._record_hand_off(job, "released")
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
                self.metrics.prefilled(request.prompt_tokens - request.cached, remote=False)
                if self._wrong:
                    self._use_cached(job)
            if output.index == 0 and job.pushes:
                self._spawn(self.connector.push(job.params, request.request_id, job.prompt.digest))
            self.metrics.token(request, end - job.last_token if output.index else None)
            job.last_token = end
            reason = job.finish_reason if output.finished else None
            if reason:
                # The request has ended, so _drop must not abort it: its blocks may stay pinned.
                del self._jobs[request.request_id]
                self.metrics.finished(request, reason)
                self.connector.store(job.params, job.prompt.digest)
                self.lending.computed(request.request_id)
            job.stream.put_nowait(Token(job.choice, job.answer.word(output.index), reason))

    def _use_cached(self, job: Job) -> None:
        """Have a prompt of which wrong blocks were cached answered wrongly, until it is computed anew."""
        hashes = job.request.block_hashes
        cached = job.request.cached // self.engine.profile.block_size
        if not cached:
            self._wrong.difference_update(hashes)
        elif not self._wrong.isdisjoint(hashes[:cached]):
            job.answer = Answer(job.prompt, job.choice, wrong_kv=True)

    async def _wait_for_work(self, now: float) -> None:
        """Wait for a change, or for the end of a lease."""
        expiry = self.engine.next_expiry()
        try:
            async with asyncio.timeout(None if expiry is None else max(0.0, expiry - now)):
                await self._wake.wait()
        except TimeoutError:
            pass

    # -- transfers ------------------------------------------------------------------------------------

    async def _pull(self, job: Job) -> None:
        """Pull what is cached of a prompt at the instance that the request names, if it names one."""
        if not job.params:
            return
        hashes = job.request.block_hashes
        found = await self.connector.found_at_source(job.params, hashes)
        if found:
            profile = self.engine.profile
            tokens = profile.block_size * self.engine.warm(hashes[:found])
            await asyncio.sleep(profile.transfer_time(tokens))
            self.hand_offs["pulled"] += 1
            self.metrics.prefilled(tokens, remote=True)

    def _start_transfer(self, job: Job) -> None:
        # As in vLLM: without a sender's address no KV ever comes, and the request hangs until its client
        # leaves.
        if job.offer:
            request = job.request
            blocks = self.engine.pool.blocks(request.request_id)
            job.offer = self.connector.allocated(job.offer, request.request_id, blocks, request.computed)
            job.loading = self._spawn(self._transfer(job, job.offer))

    async def _transfer(self, job: Job, offer: Any) -> None:
        request = job.request
        sender = getattr(offer, "port", 0)
        seconds = self.engine.profile.transfer_time(request.transfer_tokens)
        seconds += self.fault.slow_from.get(sender, 0.0)
        self.metrics.transfer_started(request.transfer_tokens)
        begins_with_call = self.connector.awaits_push
        if not begins_with_call:
            await asyncio.sleep(seconds)
        try:
            if sender in self.fault.refuses:
                raise TransferFailed("no handshake")
            reply = await self.connector.fetch(offer)
        except FatalHandOff as error:
            self.die(str(error))
            return
        except TransferFailed as error:
            await asyncio.sleep(self._fail_delay)
            self._transfer_failed(job, error)
            return
        if begins_with_call:
            await asyncio.sleep(seconds)
        outcome = "good"
        if getattr(offer, "port", None) in self.fault.garbled:
            job.answer = Answer(job.prompt, job.choice, wrong_kv=True)
            self._wrong.update(request.block_hashes)
        if reply.digest != job.prompt.digest:
            job.answer = Answer(job.prompt, job.choice, wrong_kv=True)
            # A short prompt takes a part of what was pushed, and gives back the whole.
            outcome = "released" if job.prompt.tokens < reply.tokens else "stale"
        self._record_hand_off(job, outcome)
        self.metrics.transferred(request.transfer_tokens, seconds)
        self.metrics.prefilled(request.transfer_tokens, remote=True)
        self.engine.transfer_done(request.request_id)
        self._wake.set()

    def _transfer_failed(self, job: Job, error: TransferFailed) -> None:
        self._record_hand_off(job, "recomputed" if self._recompute else "failed")
        job.offer = None
        self.metrics.transfer_failed()
        self.engine.transfer_failed(job.request.request_id, recompute=self._recompute)
        self._wake.set()
        if not self._recompute:
            self.metrics.finished(job.request, "error")
            del self._jobs[job.request.request_id]
            job.stream.put_nowait(EngineFailed("Internal server error"))

    def _record_hand_off(self, job: Job, outcome: str) -> None:
        job.on_hand_off(outcome)
        self.hand_offs[outcome] += 1

    def _death_error(self) -> EngineFailed:
        return EngineFailed("EngineCore encountered an issue. See stack trace (above) for the root cause.")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
