"""One vLLM engine as a pure state machine: continuous batching, chunked prefill, KV blocks, hand-off.

The engine does no I/O and knows only the time it is told, so the same code runs behind an HTTP server in
real time and in a replay in virtual time. It counts tokens and never sees text.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from .blocks import BlockPool
from .leap import Leap
from .profile import EngineProfile
from .request import EngineRequest, HandOff, State

__all__ = ["Engine", "EngineRequest", "Fetch", "HandOff", "Output", "State", "Step"]


class Fetch(Enum):
    """What a fetch of pinned blocks found."""

    GOOD = "good"
    STALE = "stale"
    """Nothing is pinned under that name, or other blocks are: the bytes are some other prompt's."""
    INVALID = "invalid"
    """A block id that this engine does not have."""


@dataclass(frozen=True, slots=True)
class Output:
    """One new token: number `index` of the request's answer; `finished` on its last."""

    request: EngineRequest
    index: int
    finished: bool


@dataclass(slots=True)
class Step:
    """What one iteration did. Its outputs exist `duration` seconds after it began."""

    duration: float = 0.0
    prefill_tokens: int = 0
    decoding: int = 0
    outputs: list[Output] = field(default_factory=list)
    transfers: list[EngineRequest] = field(default_factory=list)
    """Requests whose KV must now be fetched; answer with `transfer_done` or `transfer_failed`."""
    preempted: list[EngineRequest] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """Nothing was done: stepping again is of use only after something else has changed."""
        return not (self.prefill_tokens or self.decoding or self.preempted)


@dataclass(frozen=True, slots=True)
class _Pin:
    request: EngineRequest
    expires: float


class Engine:
    """Continuous batching as in vLLM's scheduler: running requests first, then waiting ones in order."""

    def __init__(self, profile: EngineProfile | None = None) -> None:
        self.profile = profile or EngineProfile()
        self.pool = BlockPool(self.profile.num_blocks, caching=self.profile.prefix_caching)
        self._requests: dict[str, EngineRequest] = {}
        self._waiting: deque[EngineRequest] = deque()
        self._deferred: dict[str, EngineRequest] = {}
        # Fetched requests hold blocks while they wait for a place. They go before all others, for a
        # request that waits for blocks must never stand in front of one that holds them.
        self._fetched: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []
        self._pinned: dict[str, _Pin] = {}
        # Requests whose last token is computed by the step under way: they run until it ends.
        self._ending = 0

    # -- what an observer sees ------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in the batch, those included that the step under way finishes."""
        return len(self._running) + self._ending

    @property
    def queued(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting) + len(self._fetched)

    @property
    def deferred(self) -> int:
        """Requests that wait for their KV to arrive."""
        return len(self._deferred)

    @property
    def pinned(self) -> int:
        """Hand-offs that nobody has fetched yet."""
        return len(self._pinned)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks in use, pinned ones included: 0 to 1."""
        return self.pool.used / self.pool.size

    def next_expiry(self) -> float | None:
        """When the first lease ends."""
        return min((pin.expires for pin in self._pinned.values()), default=None)

    # -- requests come and go -------------------------------------------------------------------------

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue a new request. Raise ValueError for a name in use or a request that can never fit."""
        if request.request_id in self._requests:
            raise ValueError(f"request id in use: {request.request_id}")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError("a request needs a prompt token and an output token")
        if request.prompt_tokens + request.output_tokens > self.profile.capacity:
            raise ValueError(f"longer than the KV cache of {self.profile.capacity} tokens")
        if len(request.block_hashes) > request.prompt_tokens // self.profile.block_size:
            raise ValueError("more block hashes than the prompt has full blocks")
        request.arrived = now
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request, whatever it is doing, and free its blocks; False when there is none."""
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
        """The blocks that are pinned for a hand-off, in the order of its tokens; empty when none are."""
        return self.pool.blocks(request_id) if request_id in self._pinned else []

    def fetch(self, request_id: str, block_ids: Sequence[int], now: float) -> Fetch:
        """Another engine has read these blocks for that hand-off: say what it got, and unpin."""
        self.expire(now)
        if any(not 1 <= block <= self.pool.size for block in block_ids):
            return Fetch.INVALID
        pinned = self.pinned_blocks(request_id)
        self.release(request_id)
        return Fetch.GOOD if pinned and pinned == list(block_ids) else Fetch.STALE

    def release(self, request_id: str) -> bool:
        """Nobody will fetch this hand-off: unpin it; False when it is not pinned."""
        return request_id in self._pinned and self.abort(request_id)

    def expire(self, now: float) -> list[str]:
        """Unpin the hand-offs whose lease has ended and return their names."""
        # Not in order: a step may be asked for before the one before it would have ended.
        expired = [request_id for request_id, pin in self._pinned.items() if pin.expires <= now]
        for request_id in expired:
            self.abort(request_id)
        return expired

    # -- hand-off, the receiving side -----------------------------------------------------------------

    def transfer_done(self, request_id: str) -> None:
        """The KV of a deferred request has come: it decodes as soon as there is a place."""
        request = self._deferred.pop(request_id)
        self._register(request, request.computed, request.prompt_tokens)
        # As in vLLM, the prompt's last token is computed again: that gives the first token of the answer.
        request.computed = request.prompt_tokens - 1
        request.remote = True
        request.state = State.WAITING
        self._fetched.append(request)

    def transfer_failed(self, request_id: str, *, recompute: bool) -> None:
        """The KV of a deferred request will not come: prefill it here, or drop it."""
        if not recompute:
            self.abort(request_id)
            return
        request = self._deferred.pop(request_id)
        request.remote = True
        request.state = State.WAITING
        request.computed = 0
        self.pool.release(request_id)
        self._waiting.appendleft(request)

    # -- one iteration --------------------------------------------------------------------------------

    def step(self, now: float) -> Step:
        """Run one iteration that begins now. The caller delivers its outputs when it has ended."""
        step = Step(expired=self.expire(now))
        self._ending = 0
        batch: list[tuple[EngineRequest, int]] = []
        budget = self._schedule_running(batch, step)
        if not step.preempted:
            self._schedule_waiting(batch, budget, now, step)
        if batch:
            step.duration = self._duration(batch, step)
            self._advance(batch, now + step.duration, step)
        return step

    def _schedule_running(self, batch: list[tuple[EngineRequest, int]], step: Step) -> int:
        budget = self.profile.max_num_batched_tokens
        at = 0
        while at < len(self._running) and budget:
            request = self._running[at]
            tokens = min(request.todo, budget)
            while not self._grow(request, tokens):
                # Without room the youngest gives way, be it this very request, and starts anew later.
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
            elsewhere = request.hand_off is HandOff.RECEIVE and not request.remote
            tokens = request.prompt_tokens + request.generated - start
            if not elsewhere:
                tokens = min(tokens, budget)
            self.pool.grow(request.request_id, self.profile.blocks_for(start + tokens), shared)
            request.computed = start
            if request.started is None:
                request.started = now
                request.cached = start if shared else 0
            if elsewhere:
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
        """The cached blocks that a request which holds none can begin with."""
        if request.computed or not request.block_hashes:
            return []
        # Never all: the last token is computed, since it gives the next one.
        return self.pool.find(request.block_hashes, (request.todo - 1) // self.profile.block_size)

    def _fits(self, request: EngineRequest, shared: list[int]) -> bool:
        # As in vLLM, the whole prompt must have room, though its chunks take their blocks one by one.
        total = self.profile.blocks_for(request.prompt_tokens + request.generated)
        return self.pool.fits(request.request_id, total, shared)

    def _grow(self, request: EngineRequest, tokens: int) -> bool:
        if not self.pool.grow(request.request_id, self.profile.blocks_for(request.computed + tokens)):
            return False
        self._register(request, request.computed, request.computed + tokens)
        return True

    def _register(self, request: EngineRequest, start: int, stop: int) -> None:
        """The prompt's tokens `start` to `stop` are, or will be when this step ends, in its blocks."""
        if start < request.prompt_tokens and request.block_hashes:
            size = self.profile.block_size
            self.pool.register(request.request_id, request.block_hashes, start // size, stop // size)

    def _preempt(self, request: EngineRequest, step: Step) -> None:
        request.state = State.WAITING
        request.computed = 0
        request.remote = True  # its fetched KV is lost with its blocks, so it is prefilled here
        self.pool.release(request.request_id)
        self._waiting.appendleft(request)
        step.preempted.append(request)

    def _duration(self, batch: list[tuple[EngineRequest, int]], step: Step) -> float:
        kv_tokens, attended = 0, 0.0
        for request, tokens in batch:
            if request.todo == 1:
                step.decoding += 1
                kv_tokens += request.computed
            else:
                step.prefill_tokens += tokens
                attended += tokens * (request.computed + tokens / 2)
        return self.profile.step_time(step.prefill_tokens, step.decoding, kv_tokens, attended)

    def _advance(self, batch: list[tuple[EngineRequest, int]], end: float, step: Step) -> None:
        for request, tokens in batch:
            request.computed += tokens
            if request.todo:
                continue  # a chunk of its prompt is still to come
            last = request.generated + 1 == request.output_tokens
            step.outputs.append(Output(request, request.generated, last))
            request.generated += 1
            request.last_token = end
            if request.first_token is None:
                request.first_token = end
            if last:
                self._ending += 1
                self._finish(request, end)
        if self._ending:
            self._running = [request for request in self._running if request.state is State.RUNNING]

    def _finish(self, request: EngineRequest, end: float) -> None:
        if request.hand_off is HandOff.SEND:
            request.state = State.PINNED
            self._pinned[request.request_id] = _Pin(request, end + self.profile.lease)
        else:
            request.state = State.GONE
            del self._requests[request.request_id]
            self.pool.release(request.request_id)

    # -- many iterations ------------------------------------------------------------------------------

    def leap(self, now: float) -> Leap | None:
        """The steps from now on that only decode, finish nothing and admit nothing; None for fewer than two.

        Nothing has changed yet: `take` applies steps of the leap. Whatever else is done to the engine ends
        the leap, after the step that is under way.
        """
        batch = self._running
        if not batch or any(request.todo != 1 or not request.generated for request in batch):
            return None
        budget = self.profile.max_num_batched_tokens - len(batch)
        if budget < 0 or self._admits(budget):
            return None
        steps = self._steps_with_room(min(request.output_tokens - request.generated for request in batch) - 1)
        kv_tokens = sum(request.computed for request in batch)
        first = self.profile.step_time(0, len(batch), kv_tokens)
        growth = len(batch) * self.profile.decode_per_kv_token
        leap = Leap(now, steps, first, growth, len(batch))
        expiry = self.next_expiry()
        if expiry is not None:  # the step that begins then unpins blocks, which may let a request in
            leap.steps = min(steps, leap.begun(expiry))
        if leap.steps < 2:
            return None
        self._ending = 0
        return leap

    def take(self, leap: Leap, steps: int) -> None:
        """Apply the first `steps` steps of the leap, less those that were applied before."""
        more = steps - leap.taken
        if more <= 0:
            return
        leap.taken = steps
        end = leap.end(steps)
        for request in self._running:
            self.pool.grow(request.request_id, self.profile.blocks_for(request.computed + more))
            request.computed += more
            request.generated += more
            request.last_token = end

    def _admits(self, budget: int) -> bool:
        """Whether a step would take in the first in the queue, next to a batch that only decodes.

        If not, no later one will: decoding takes blocks and cached prompts away and adds none.
        """
        queue = self._fetched or self._waiting
        if not (queue and budget) or len(self._running) >= self.profile.max_num_seqs:
            return False
        return self._fits(queue[0], self._find_cached(queue[0]))

    def _steps_with_room(self, most: int) -> int:
        """How many steps, `most` at most, the free blocks allow to this batch."""

        def blocks(steps: int) -> int:
            blocks_for = self.profile.blocks_for
            return sum(
                blocks_for(request.computed + steps) - blocks_for(request.computed)
                for request in self._running
            )

        free = self.pool.free
        if blocks(most) <= free:
            return most
        return bisect_right(range(most), free, key=blocks) - 1
