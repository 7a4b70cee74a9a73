"""Engines in virtual time: a clock that jumps from event to event, and an engine that it drives.

An hour of traffic takes seconds: a step is one event, at its end, and steps in which a batch only decodes are
one event together (``Leap``), with the same results as one by one.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush

from .engine import Engine, Fetch, Step
from .leap import Leap
from .request import EngineRequest, HandOff, State

TokenCallback = Callable[[EngineRequest, float], None]
"""Called with a request and the time of its token."""

Transport = Callable[["VirtualInstance", "VirtualInstance", float, Callable[[], None]], None]
"""Carries so many bytes from one instance to another, and then calls the last argument."""

CacheCallback = Callable[[list[tuple[int, bool]], float], None]
"""Called with the hashes of blocks that a step has cached (True) or evicted (False), and the step's end."""


class Handle:
    """A scheduled event."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Cancel the event. Does nothing if it has happened or was cancelled."""
        self._callback = None

    def fire(self) -> None:
        """Let the event happen, unless it was cancelled."""
        callback, self._callback = self._callback, None
        if callback:
            callback()


class VirtualClock:
    """A queue of events. Time, in seconds, stands still during an event and then jumps to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._stopped = False
        self._events: list[tuple[float, int, Handle]] = []
        self._count = 0

    def call_at(self, time: float, callback: Callable[[], None]) -> Handle:
        """Schedule a call; a time in the past means now. Calls at the same time keep their order."""
        handle = Handle(callback)
        self._count += 1
        heappush(self._events, (max(time, self.now), self._count, handle))
        return handle

    def run(self) -> None:
        """Let events happen until there are none, or until ``stop``."""
        events = self._events
        while events and not self._stopped:
            self.now, _, handle = heappop(events)
            handle.fire()

    def stop(self) -> None:
        """End ``run``; the remaining events do not happen."""
        self._stopped = True

    def run_until(self, time: float) -> None:
        """Let the events up to and at that time happen, and set the time to it."""
        events = self._events
        while events and events[0][0] <= time:
            self.now, _, handle = heappop(events)
            handle.fire()
        self.now = max(self.now, time)


@dataclass(frozen=True, slots=True)
class Offer:
    """A hand-off: the blocks that ``source`` has pinned for a request."""

    source: "VirtualInstance"
    request_id: str
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The metrics of an instance at one moment. Counters are since the start of the run."""

    running: int
    queued: int
    """Requests that wait for room in the batch or the KV cache."""
    deferred: int
    """Requests that wait for their KV from another engine."""
    pinned: int
    kv_usage: float
    prompt_tokens: int
    cached_tokens: int
    """Those of ``prompt_tokens`` that were in the prefix cache."""
    generation_tokens: int
    finished: int
    preemptions: int
    busy: float
    """Seconds in which the engine computed."""
    gaps: int
    """Tokens after the first of their request: the count of ``vllm:inter_token_latency_seconds``."""
    gap_seconds: float
    """Seconds between these tokens and those before them: the sum of that metric."""

    @property
    def waiting(self) -> int:
        """Requests that wait: ``vllm:num_requests_waiting``."""
        return self.queued + self.deferred


@dataclass(slots=True)
class _Job:
    request: EngineRequest
    offer: Offer | None
    on_first_token: TokenCallback | None
    on_finished: TokenCallback | None


class VirtualInstance:
    """Drives one engine by a clock.

    With ``leaping`` it is faster, and gives the same times as step by step. A transfer takes the receiver's
    ``profile.transfer_time``, and transfers do not slow down each other; with a ``transport`` it takes the
    profile's latency and what the transport makes of its bytes. ``on_cache`` is told what the engine's prefix
    cache gains and loses.
    """

    def __init__(
        self,
        engine: Engine,
        clock: VirtualClock,
        *,
        leaping: bool = True,
        transport: Transport | None = None,
        on_cache: CacheCallback | None = None,
    ) -> None:
        self.engine = engine
        self.clock = clock
        self._transport = transport
        self._on_cache = on_cache
        if on_cache is not None:
            engine.pool.changes = []
        self.hand_offs: Counter[Fetch] = Counter()
        """Hand-offs received, by the outcome of the fetch. Where it was not good, this engine prefills."""
        self._leaping = leaping
        self._leap: Leap | None = None
        self._next_event: Handle | None = None
        """The end of the current step or leap, or the start of the next one; None while idle."""
        self._lease_timer: Handle | None = None
        """The end of a lease that a waiting request needs; only while idle."""
        self._jobs: dict[str, _Job] = {}
        self._prompt_tokens = self._cached_tokens = self._generation_tokens = 0
        self._finished = self._preemptions = self._gaps = 0
        self._busy = self._gap_seconds = 0.0

    # -- requests -------------------------------------------------------------------------------------

    def add(
        self,
        request: EngineRequest,
        *,
        offer: Offer | None = None,
        on_first_token: TokenCallback | None = None,
        on_finished: TokenCallback | None = None,
    ) -> None:
        """Queue a request now. The callbacks get the end of the step that computed the token.

        Raise ValueError for a request that can never run (see ``Engine.add``), and for a RECEIVE request
        without an offer.
        """
        if request.hand_off is HandOff.RECEIVE and offer is None:
            raise ValueError("a request that receives its KV needs an offer to fetch")
        self._interrupt()
        self.engine.add(request, self.clock.now)
        self._jobs[request.request_id] = _Job(request, offer, on_first_token, on_finished)

    def abort(self, request_id: str) -> bool:
        """Remove a request, free its blocks and release its offer; return whether there was one."""
        self._interrupt()
        job = self._jobs.pop(request_id, None)
        if job and job.offer:
            job.offer.source.release(job.offer.request_id)
        return self.engine.abort(request_id)

    def offer(self, request_id: str) -> Offer:
        """Return the hand-off of a finished SEND request, for the RECEIVE request on another instance."""
        return Offer(self, request_id, self.engine.pinned_blocks(request_id))

    def fetch(self, offer: Offer) -> Fetch:
        """Record that another instance has read these blocks: unpin them and return what was read."""
        self._interrupt()
        return self.engine.fetch(offer.request_id, offer.block_ids, self.clock.now)

    def release(self, request_id: str) -> bool:
        """Unpin a hand-off that nobody will fetch; return whether it was pinned."""
        self._interrupt()
        return self.engine.release(request_id)

    def snapshot(self) -> Snapshot:
        """Return the metrics at this moment."""
        self._apply_started_steps()
        engine, leap = self.engine, self._leap
        engine.expire(self.clock.now)
        # The current step has been applied, but its tokens come only at its end.
        tokens = (leap.applied - 1) * leap.batch if leap else 0
        seconds = leap.end(leap.applied - 1) - leap.start if leap else 0.0
        return Snapshot(
            running=engine.running,
            queued=engine.queued,
            deferred=engine.deferred,
            pinned=engine.pinned,
            kv_usage=engine.kv_usage,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generation_tokens=self._generation_tokens + tokens,
            finished=self._finished,
            preemptions=self._preemptions,
            busy=self._busy + seconds,
            gaps=self._gaps + tokens,
            gap_seconds=self._gap_seconds + (leap.batch * seconds if leap else 0.0),
        )

    # -- steps ----------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        now = self.clock.now
        self._next_event = None
        if self._lease_timer:
            self._lease_timer.cancel()
        self._leap = self.engine.leap(now) if self._leaping else None
        if self._leap:
            self._next_event = self.clock.call_at(self._leap.end(self._leap.steps), self._on_leap_end)
            return
        step = self.engine.step(now)
        self._preemptions += len(step.preempted)
        for request in step.transfers:
            self._transfer(request)
        self._tell_of_cache(now + step.duration)
        if not step.idle:
            self._next_event = self.clock.call_at(now + step.duration, partial(self._on_step_end, step))
        elif self.engine.queued and (expiry := self.engine.next_expiry()) is not None:
            # A request waits for blocks: those of a lease that ends, if nothing else happens before.
            self._lease_timer = self.clock.call_at(expiry, self._interrupt)

    def _on_step_end(self, step: Step) -> None:
        self._generation_tokens += len(step.outputs)
        following = sum(1 for output in step.outputs if output.index)
        self._count(step.duration, following)
        for output in step.outputs:
            if output.index and not output.finished:
                continue
            request = output.request
            job = self._jobs.get(request.request_id)
            if job is None or job.request is not request:
                continue  # aborted during the step
            if output.index == 0:
                self._prompt_tokens += request.prompt_tokens
                self._cached_tokens += request.cached
                if job.on_first_token:
                    job.on_first_token(request, self.clock.now)
            if output.finished:
                self._finished += 1
                del self._jobs[request.request_id]
                if job.on_finished:
                    job.on_finished(request, self.clock.now)
        self._start_next()

    def _on_leap_end(self) -> None:
        leap = self._leap
        assert leap is not None
        self.engine.apply(leap, leap.steps)
        self._tell_of_cache(self.clock.now)
        self._generation_tokens += leap.steps * leap.batch
        seconds = leap.end(leap.steps) - leap.start
        self._count(seconds, leap.steps * leap.batch, seconds * leap.batch)
        self._start_next()

    def _count(self, seconds: float, gaps: int, gap_seconds: float | None = None) -> None:
        self._busy += seconds
        self._gaps += gaps
        self._gap_seconds += gaps * seconds if gap_seconds is None else gap_seconds

    def _apply_started_steps(self) -> None:
        """Apply the steps of the leap that have started by now to the engine."""
        if self._leap:
            self.engine.apply(self._leap, self._leap.started(self.clock.now))
            self._tell_of_cache(self.clock.now)

    def _tell_of_cache(self, at: float) -> None:
        changes = self.engine.pool.changes
        if changes and self._on_cache is not None:
            self.engine.pool.changes = []
            self._on_cache(changes, at)

    def _interrupt(self) -> None:
        """Prepare for a change of the engine: end a leap after its current step.

        If the engine is idle, let it look for work after the change.
        """
        if self._leap:
            self._apply_started_steps()
            if self._leap.applied < self._leap.steps and self._next_event:
                self._leap.steps = self._leap.applied
                self._next_event.cancel()
                self._next_event = self.clock.call_at(self._leap.end(self._leap.steps), self._on_leap_end)
        elif self._next_event is None:
            self._next_event = self.clock.call_at(self.clock.now, self._start_next)

    # -- transfers ------------------------------------------------------------------------------------

    def _transfer(self, request: EngineRequest) -> None:
        profile, ends = self.engine.profile, partial(self._on_transfer_end, request)
        offer = self._jobs[request.request_id].offer
        if self._transport is None or offer is None:
            self.clock.call_at(self.clock.now + profile.transfer_time(request.transfer_tokens), ends)
            return
        size = request.transfer_tokens * profile.kv_bytes_per_token
        carry = partial(self._transport, offer.source, self, float(size), ends)
        self.clock.call_at(self.clock.now + profile.transfer_latency, carry)

    def _on_transfer_end(self, request: EngineRequest) -> None:
        if request.state is not State.DEFERRED:
            return  # aborted during the transfer
        self._interrupt()
        job = self._jobs[request.request_id]
        assert job.offer is not None
        found = job.offer.source.fetch(job.offer)
        job.offer = None
        self.hand_offs[found] += 1
        if found is Fetch.GOOD:
            self.engine.transfer_done(request.request_id)
            self._tell_of_cache(self.clock.now)
        else:
            self.engine.transfer_failed(request.request_id, recompute=True)
