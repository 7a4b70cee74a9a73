"""One vLLM engine as a pure state machine: continuous batching, chunked prefill, KV blocks, hand-off.

The engine does no I/O and knows only the time it is told, so the same code runs behind an HTTP server in
real time and in a replay in virtual time. It counts tokens and never sees text.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from vllm_pd_scheduler.sim.blocks import BlockPool
from vllm_pd_scheduler.sim.profile import EngineProfile


class HandOff(Enum):
    """What a request does with its KV cache beyond this engine."""

    NONE = "none"
    SEND = "send"
    """`do_remote_decode`: the blocks stay pinned after the last token, for another engine to fetch."""
    RECEIVE = "receive"
    """`do_remote_prefill`: the prompt's KV comes from another engine."""


class State(Enum):
    """Where a request is."""

    WAITING = "waiting"
    DEFERRED = "deferred"
    RUNNING = "running"
    PINNED = "pinned"
    GONE = "gone"


class Fetch(Enum):
    """What a fetch of pinned blocks found."""

    GOOD = "good"
    STALE = "stale"
    """Nothing is pinned under that name, or other blocks are: the bytes are some other prompt's."""
    INVALID = "invalid"
    """A block id that this engine does not have."""


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A request and how far it has come. The caller fills the first four, the engine all others.

    `prompt_tokens` and `output_tokens` are at least 1. Times are in the caller's clock.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    hand_off: HandOff = HandOff.NONE
    state: State = State.WAITING
    computed: int = 0
    generated: int = 0
    remote: bool = False
    """The prompt's KV has come from another engine (or its coming has failed): do not ask for it again."""
    arrived: float = 0.0
    started: float | None = None
    first_token: float | None = None
    last_token: float = 0.0

    @property
    def todo(self) -> int:
        """Tokens to compute before the next one is known: 1 while decoding."""
        return self.prompt_tokens + self.generated - self.computed


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
        self.pool = BlockPool(self.profile.num_blocks)
        self._requests: dict[str, EngineRequest] = {}
        self._waiting: deque[EngineRequest] = deque()
        self._deferred: dict[str, EngineRequest] = {}
        # Fetched requests hold blocks while they wait for a place. They go before all others, for a
        # request that waits for blocks must never stand in front of one that holds them.
        self._fetched: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []
        self._pinned: dict[str, _Pin] = {}

    # -- what an observer sees ------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

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
        self.pool.release(request_id)
        self._waiting.appendleft(request)

    # -- one iteration --------------------------------------------------------------------------------

    def step(self, now: float) -> Step:
        """Run one iteration that begins now. The caller delivers its outputs when it has ended."""
        step = Step(expired=self.expire(now))
        batch: list[tuple[EngineRequest, int]] = []
        budget = self._schedule_running(batch, step)
        if not step.preempted:
            self._schedule_waiting(batch, budget, now, step)
        if batch:
            kv_tokens = 0
            for request, tokens in batch:
                if request.todo == 1:
                    step.decoding += 1
                    kv_tokens += request.computed
                else:
                    step.prefill_tokens += tokens
            step.duration = self.profile.step_time(step.prefill_tokens, step.decoding, kv_tokens)
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
            remote = request.hand_off is HandOff.RECEIVE and not request.remote
            tokens = request.prompt_tokens if remote else min(request.todo, budget)
            if not self._grow(request, tokens):
                return
            queue.popleft()
            if request.started is None:
                request.started = now
            if remote:
                request.state = State.DEFERRED
                self._deferred[request.request_id] = request
                step.transfers.append(request)
            else:
                request.state = State.RUNNING
                self._running.append(request)
                batch.append((request, tokens))
                budget -= tokens

    def _grow(self, request: EngineRequest, tokens: int) -> bool:
        return self.pool.grow(request.request_id, self.profile.blocks_for(request.computed + tokens))

    def _preempt(self, request: EngineRequest, step: Step) -> None:
        request.state = State.WAITING
        request.computed = 0
        request.remote = True  # its fetched KV is lost with its blocks, so it is prefilled here
        self.pool.release(request.request_id)
        self._waiting.appendleft(request)
        step.preempted.append(request)

    def _advance(self, batch: list[tuple[EngineRequest, int]], end: float, step: Step) -> None:
        finished = False
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
                finished = True
                self._finish(request, end)
        if finished:
            self._running = [request for request in self._running if request.state is State.RUNNING]

    def _finish(self, request: EngineRequest, end: float) -> None:
        if request.hand_off is HandOff.SEND:
            request.state = State.PINNED
            self._pinned[request.request_id] = _Pin(request, end + self.profile.lease)
        else:
            request.state = State.GONE
            del self._requests[request.request_id]
            self.pool.release(request.request_id)
