"""vLLM's engine as a pure state machine: continuous batching, chunked prefill, KV blocks, hand-off.

Source: ``vllm/v1/core/sched/scheduler.py`` of vLLM 0.32. The engine does no I/O and takes the time as an
argument, so the same code runs behind an HTTP server in real time and in a replay in virtual time. It counts
tokens and never sees text.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import BlockPool
from .leap import Leap
from .profile import EngineProfile
from .request import EngineRequest, HandOff, State
from .step import Fetch, Output, Step

__all__ = ["Engine", "EngineRequest", "Fetch", "HandOff", "Output", "State", "Step"]


_WARM = "warm"
"""Holder of blocks that came from elsewhere, while they are cached."""


@dataclass(frozen=True, slots=True)
class _Pin:
    """Blocks that are kept for another engine to fetch."""

    request: EngineRequest
    expires: float


class Engine:
    """Schedules as vLLM does: each step serves running requests first, then waiting ones in order."""

    def __init__(self, profile: EngineProfile | None = None) -> None:
        self.profile = profile or EngineProfile()
        self.pool = BlockPool(self.profile.num_blocks, caching=self.profile.prefix_caching)
        self._requests: dict[str, EngineRequest] = {}
        self._waiting: deque[EngineRequest] = deque()
        self._deferred: dict[str, EngineRequest] = {}
        # Requests whose KV was fetched hold blocks while they wait for a place in the batch. They go before
        # all others: one that waits for blocks must never be in front of one that holds them.
        self._fetched: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []
        self._pinned: dict[str, _Pin] = {}
        # Requests whose last token the current step computes: to an observer they run until it ends.
        self._finishing = 0

    # -- observing ------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in the batch, including those that the current step finishes."""
        return len(self._running) + self._finishing

    @property
    def queued(self) -> int:
        """Requests that wait for room in the batch or the KV cache."""
        return len(self._waiting) + len(self._fetched)

    @property
    def deferred(self) -> int:
        """Requests that wait for their KV from another engine."""
        return len(self._deferred)

    @property
    def pinned(self) -> int:
        """Hand-offs that are not fetched yet."""
        return len(self._pinned)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that are held, including pinned ones, 0 to 1."""
        return self.pool.used / self.pool.size

    def next_expiry(self) -> float | None:
        """Return when the first lease ends; None without one."""
        return min((pin.expires for pin in self._pinned.values()), default=None)

    # -- adding and aborting requests
    # -------------------------------------------------------------------------

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue a new request; raise ValueError for an id in use, or a request that can never fit."""
        if request.request_id in self._requests:
            raise ValueError(f"request id in use: {request.request_id}")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError("a request needs a prompt token and an output token")
        if request.prompt_tokens + request.output_tokens > self.profile.capacity:
            raise ValueError(f"longer than the KV cache of {self.profile.capacity} tokens")
        tokens = request.prompt_tokens + request.output_tokens
        if len(request.block_hashes) > tokens // self.profile.block_size:
            raise ValueError("more block hashes than the prompt and the answer have full blocks")
        request.arrived = now
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Remove a request in any state and free its blocks; return whether there was one."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request.state is State.WAITING:
            queue = self._fetched if request in self._fetched else self._waiting
            queue.remove(request)
        elif request.state is State.DEFERRED:
            del self._deferred[request_id]
        elif request.state is State.RUNNING:
            self._running.remove(request)
        elif request.state is State.PINNED:
            del self._pinned[request_id]
        request.state = State.GONE
        self.pool.release(request_id)
        return True

    # -- hand-off, the sending side -------------------------------------------------------------------

    def pinned_blocks(self, request_id: str) -> list[int]:
        """Return the blocks that are pinned for a hand-off, in the order of its tokens."""
        return self.pool.blocks(request_id) if request_id in self._pinned else []

    def fetch(self, request_id: str, block_ids: Sequence[int], now: float) -> Fetch:
        """Unpin a hand-off of which another engine has read these blocks; return what it has read."""
        self.expire(now)
        if any(not 1 <= block <= self.pool.size for block in block_ids):
            return Fetch.INVALID
        pinned = self.pinned_blocks(request_id)
        self.release(request_id)
        return Fetch.GOOD if pinned and pinned == list(block_ids) else Fetch.STALE

    def release(self, request_id: str) -> bool:
        """Unpin a hand-off that nobody will fetch; return whether it was pinned."""
        return request_id in self._pinned and self.abort(request_id)

    def expire(self, now: float) -> list[str]:
        """Unpin the hand-offs whose lease has ended; return their request ids."""
        # All are looked at: they are not always pinned in the order of their time, since a caller may start a
        # step before the one before it would have ended.
        expired = [request_id for request_id, pin in self._pinned.items() if pin.expires <= now]
        for request_id in expired:
            self.abort(request_id)
        return expired

    # -- hand-off, the receiving side -----------------------------------------------------------------

    def transfer_done(self, request_id: str) -> None:
        """Record that a deferred request's KV has come: it runs as soon as there is a place in the batch."""
        request = self._deferred.pop(request_id)
        self._register(request, request.computed, request.prompt_tokens)
        # As in vLLM, the prompt's last token is computed again, which gives the first token of the answer.
        request.computed = request.prompt_tokens - 1
        request.transfer_ended = True
        request.state = State.WAITING
        self._fetched.append(request)

    def transfer_failed(self, request_id: str, *, recompute: bool) -> None:
        """Record that a deferred request's KV will not come: prefill it here (``recompute``) or abort it."""
        if not recompute:
            self.abort(request_id)
            return
        request = self._deferred.pop(request_id)
        request.transfer_ended = True
        request.state = State.WAITING
        request.computed = 0
        self.pool.release(request_id)
        self._waiting.appendleft(request)

    def warm(self, hashes: Sequence[int]) -> int:
        """Cache the first blocks of a prompt, which came from elsewhere; return how many were new.

        Nothing happens if there is no room.
        """
        known = self.pool.find(hashes, len(hashes))
        if len(known) == len(hashes) or not self.pool.grow(_WARM, len(hashes), known):
            return 0
        self.pool.register(_WARM, hashes, len(known), len(hashes))
        self.pool.release(_WARM)
        return len(hashes) - len(known)

    # -- one iteration --------------------------------------------------------------------------------

    def step(self, now: float) -> Step:
        """Run one iteration that starts now. The caller delivers its outputs at its end."""
        step = Step(expired=self.expire(now))
        self._finishing = 0
        batch: list[tuple[EngineRequest, int]] = []
        budget = self._schedule_running(batch, step)
        if not step.preempted:
            self._schedule_waiting(batch, budget, now, step)
        if batch:
            step.duration = self._duration(batch, step)
            self._advance(batch, now + step.duration, step)
        return step

    def _schedule_running(self, batch: list[tuple[EngineRequest, int]], step: Step) -> int:
        """Add running requests to the batch, preempting some if blocks run out; return the budget's rest."""
        budget = self.profile.max_num_batched_tokens
        at = 0
        while at < len(self._running) and budget:
            request = self._running[at]
            tokens = min(request.uncomputed, budget)
            while not self._grow(request, tokens):
                # Without free blocks the request that started last is preempted, which may be this one.
                victim = self._running.pop()
                self._preempt(victim, step)
                if victim is request:
                    return budget
            batch.append((request, tokens))
            budget -= tokens
            at += 1
        return budget

    def _schedule_waiting(
        self, batch: list[tuple[EngineRequest, int]], budget: int, now: float, step: Step
    ) -> None:
        """Start waiting requests, in their order, as long as the first one fits."""
        while budget and len(self._running) < self.profile.max_num_seqs:
            queue = self._fetched or self._waiting
            if not queue:
                return
            request = queue[0]
            shared = self._find_cached(request)
            if not self._fits(request, shared):
                return
            queue.popleft()
            start = request.computed + len(shared) * self.profile.block_size
            fetch = request.hand_off is HandOff.RECEIVE and not request.transfer_ended
            tokens = request.prompt_tokens + request.generated - start
            if not fetch:
                tokens = min(tokens, budget)
            self.pool.grow(request.request_id, self.profile.blocks_for(start + tokens), shared)
            request.computed = start
            if request.started is None:
                request.started = now
                request.cached = start if shared else 0
            if fetch:
                request.state = State.DEFERRED
                request.transfer_tokens = tokens
                self._deferred[request.request_id] = request
                step.transfers.append(request)
            else:
                request.state = State.RUNNING
                self._running.append(request)
                self._register(request, start, start + tokens)
                batch.append((request, tokens))
                budget -= tokens

    def _find_cached(self, request: EngineRequest) -> list[int]:
        """Return the cached blocks with which a request that holds none can start."""
        if request.computed or not request.block_hashes:
            return []
        # Never all of them: the last token is computed in any case, since that gives the next one.
        return self.pool.find(request.block_hashes, (request.uncomputed - 1) // self.profile.block_size)

    def _fits(self, request: EngineRequest, shared: list[int]) -> bool:
        # As in vLLM, there must be room for the whole prompt, though its chunks get their blocks one by one.
        total = self.profile.blocks_for(request.prompt_tokens + request.generated)
        return self.pool.fits(request.request_id, total, shared)

    def _grow(self, request: EngineRequest, tokens: int) -> bool:
        """Allocate blocks for the next tokens of a request; return whether enough were free."""
        if not self.pool.grow(request.request_id, self.profile.blocks_for(request.computed + tokens)):
            return False
        self._register(request, request.computed, request.computed + tokens)
        return True

    def _register(self, request: EngineRequest, start: int, stop: int) -> None:
        """Cache the full blocks between two tokens: they are filled when the current step ends."""
        size = self.profile.block_size
        if start < len(request.block_hashes) * size:
            self.pool.register(request.request_id, request.block_hashes, start // size, stop // size)

    def _preempt(self, request: EngineRequest, step: Step) -> None:
        request.state = State.WAITING
        request.computed = 0
        request.transfer_ended = True  # KV that was fetched is lost with the blocks: it is prefilled here
        self.pool.release(request.request_id)
        self._waiting.appendleft(request)
        step.preempted.append(request)

    def _duration(self, batch: list[tuple[EngineRequest, int]], step: Step) -> float:
        """Return the seconds of a step with this batch; count its work in ``step``."""
        kv_tokens, attended = 0, 0.0
        for request, tokens in batch:
            if request.uncomputed == 1:
                step.decoding += 1
                kv_tokens += request.computed
            else:
                step.prefill_tokens += tokens
                attended += tokens * (request.computed + tokens / 2)
        return self.profile.step_time(step.prefill_tokens, step.decoding, kv_tokens, attended)

    def _advance(self, batch: list[tuple[EngineRequest, int]], end: float, step: Step) -> None:
        """Apply the computed tokens, which exist at ``end``, to the requests of the batch."""
        for request, tokens in batch:
            request.computed += tokens
            if request.uncomputed:
                continue  # the rest of its prompt is computed by later steps
            last = request.generated + 1 == request.output_tokens
            step.outputs.append(Output(request, request.generated, last))
            request.generated += 1
            request.last_token = end
            if request.first_token is None:
                request.first_token = end
            if last:
                self._finishing += 1
                self._finish(request, end)
        if self._finishing:
            self._running = [request for request in self._running if request.state is State.RUNNING]

    def _finish(self, request: EngineRequest, end: float) -> None:
        if request.hand_off is HandOff.SEND:
            request.state = State.PINNED
            self._pinned[request.request_id] = _Pin(request, end + self.profile.lease)
        else:
            request.state = State.GONE
            del self._requests[request.request_id]
            self.pool.release(request.request_id)

    # -- leaps: many iterations at once
    # ------------------------------------------------------------------------------

    def leap(self, now: float) -> Leap | None:
        """Return the steps from now on that only decode, and neither finish nor start a request.

        Return None if there are fewer than two. The engine has not changed yet: ``apply`` applies steps of
        the leap. Any other change of the engine ends the leap, after the current step.
        """
        batch = self._running
        if not batch or any(request.uncomputed != 1 or not request.generated for request in batch):
            return None
        budget = self.profile.max_num_batched_tokens - len(batch)
        if budget < 0 or self._would_start_one(budget):
            return None
        steps = self._steps_with_room(min(request.output_tokens - request.generated for request in batch) - 1)
        kv_tokens = sum(request.computed for request in batch)
        first = self.profile.step_time(0, len(batch), kv_tokens)
        growth = len(batch) * self.profile.decode_per_kv_token
        leap = Leap(now, steps, first, growth, len(batch))
        expiry = self.next_expiry()
        if expiry is not None:  # the step that starts then unpins blocks, so a request may fit
            leap.steps = min(steps, leap.started(expiry))
        if leap.steps < 2:
            return None
        self._finishing = 0
        return leap

    def apply(self, leap: Leap, steps: int) -> None:
        """Apply the first ``steps`` steps of a leap, except those that were applied before."""
        more = steps - leap.applied
        if more <= 0:
            return
        leap.applied = steps
        end = leap.end(steps)
        for request in self._running:
            self._grow(request, more)  # there is room: the leap has as many steps as that lasts for
            request.computed += more
            request.generated += more
            request.last_token = end

    def _would_start_one(self, budget: int) -> bool:
        """Whether a step would start the first waiting request, beside a batch that only decodes.

        If not, no later step of such a batch will: decoding uses up blocks and cached prompts and frees none.
        (It may cache blocks of answers. But the prompt that continues one comes after its end.)
        """
        queue = self._fetched or self._waiting
        if not (queue and budget) or len(self._running) >= self.profile.max_num_seqs:
            return False
        return self._fits(queue[0], self._find_cached(queue[0]))

    def _steps_with_room(self, limit: int) -> int:
        """Return how many steps of this batch, up to ``limit``, the free blocks are enough for."""

        def blocks(steps: int) -> int:
            blocks_for = self.profile.blocks_for
            return sum(
                blocks_for(request.computed + steps) - blocks_for(request.computed)
                for request in self._running
            )

        free = self.pool.free
        if blocks(limit) <= free:
            return limit
        return bisect_right(range(limit), free, key=blocks) - 1
