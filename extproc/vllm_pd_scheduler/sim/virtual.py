"""Engines in virtual time: a clock that jumps from event to event, and one engine driven by it.

An hour of traffic passes in seconds: a step is one event at its end, and steps in which a batch only decodes
are taken together (`Leap`), with the same results as one by one.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush

from .engine import Engine, Fetch, Step
from .leap import Leap
from .request import EngineRequest, HandOff, State

Told = Callable[[EngineRequest, float], None]


class Handle:
    """An event that is to come."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Let it not come; nothing happens when it has come or was cancelled."""
        self._callback = None

    def fire(self) -> None:
        """Let it come, unless it was cancelled."""
        callback, self._callback = self._callback, None
        if callback:
            callback()


class VirtualClock:
    """Discrete events: time stands still while one happens and then jumps to the next. In seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._stopped = False
        self._events: list[tuple[float, int, Handle]] = []
        self._count = 0

    def call_at(self, time: float, callback: Callable[[], None]) -> Handle:
        """Call back at that time, after what was asked for earlier for the same time; the past is now."""
        handle = Handle(callback)
        self._count += 1
        heappush(self._events, (max(time, self.now), self._count, handle))
        return handle

    def run(self) -> None:
        """Let events happen until there are none left."""
        events = self._events
        while events and not self._stopped:
            self.now, _, handle = heappop(events)
            handle.fire()

    def stop(self) -> None:
        """End `run`: nothing that is to come happens."""
        self._stopped = True

    def run_until(self, time: float) -> None:
        """Let the events up to that time happen, those of that very moment too; then it is `time`."""
        events = self._events
        while events and events[0][0] <= time:
            self.now, _, handle = heappop(events)
            handle.fire()
        self.now = max(self.now, time)


@dataclass(frozen=True, slots=True)
class Offer:
    """A hand-off: the blocks that `source` has pinned under that name."""

    source: "VirtualInstance"
    request_id: str
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scrape would tell. Counters are since the start; tokens count when they are out."""

    running: int
    queued: int
    """Requests that wait for room."""
    deferred: int
    """Requests that wait for their KV to arrive."""
    pinned: int
    kv_usage: float
    prompt_tokens: int
    cached_tokens: int
    """Of `prompt_tokens`, those that were in the prefix cache."""
    generation_tokens: int
    finished: int
    preemptions: int
    busy: float
    """Seconds that steps took."""
    gaps: int
    """Tokens that followed another of the same request, and"""
    gap_seconds: float
    """the time between the two, summed: `vllm:inter_token_latency_seconds`."""

    @property
    def waiting(self) -> int:
        """`vllm:num_requests_waiting`."""
        return self.queued + self.deferred


@dataclass(slots=True)
class _Job:
    request: EngineRequest
    offer: Offer | None
    on_first_token: Told | None
    on_finished: Told | None


class VirtualInstance:
    """Drives one engine on a clock. Leaping is faster than stepping and gives the same times.

    A transfer takes the receiver's `profile.transfer_time`; transfers do not slow down each other.
    """

    def __init__(self, engine: Engine, clock: VirtualClock, *, leaping: bool = True) -> None:
        self.engine = engine
        self.clock = clock
        self.hand_offs: Counter[Fetch] = Counter()
        """Hand-offs received, by what the fetch found; those that were not good were prefilled here."""
        self._leaping = leaping
        self._leap: Leap | None = None
        self._next: Handle | None = None
        """The end of the step or leap under way, or the begin of the next; None at rest."""
        self._alarm: Handle | None = None
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
        on_first_token: Told | None = None,
        on_finished: Told | None = None,
    ) -> None:
        """Queue a request now; the callbacks are told the end of the step that made the token.

        Raise ValueError for a request that can never run: see `Engine.add`; a RECEIVE needs an offer.
        """
        if request.hand_off is HandOff.RECEIVE and offer is None:
            raise ValueError("a request that receives its KV needs an offer to fetch")
        self._interrupt()
        self.engine.add(request, self.clock.now)
        self._jobs[request.request_id] = _Job(request, offer, on_first_token, on_finished)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks, unfetched ones too; False when there is none."""
        self._interrupt()
        job = self._jobs.pop(request_id, None)
        if job and job.offer:
            job.offer.source.release(job.offer.request_id)
        return self.engine.abort(request_id)

    def offer(self, request_id: str) -> Offer:
        """The hand-off of a SEND request that has finished, to add a RECEIVE request with."""
        return Offer(self, request_id, self.engine.pinned_blocks(request_id))

    def fetch(self, offer: Offer) -> Fetch:
        """Another instance has read these blocks: say what it got, and unpin them."""
        self._interrupt()
        return self.engine.fetch(offer.request_id, offer.block_ids, self.clock.now)

    def release(self, request_id: str) -> bool:
        """Nobody will fetch this hand-off: unpin it; False when it is not pinned."""
        self._interrupt()
        return self.engine.release(request_id)

    def snapshot(self) -> Snapshot:
        """What a scrape would tell now."""
        self._settle()
        engine, leap = self.engine, self._leap
        engine.expire(self.clock.now)
        # The step under way has been applied, but its tokens are not out yet.
        out = (leap.taken - 1) * leap.batch if leap else 0
        lasted = leap.end(leap.taken - 1) - leap.start if leap else 0.0
        return Snapshot(
            running=engine.running,
            queued=engine.queued,
            deferred=engine.deferred,
            pinned=engine.pinned,
            kv_usage=engine.kv_usage,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generation_tokens=self._generation_tokens + out,
            finished=self._finished,
            preemptions=self._preemptions,
            busy=self._busy + lasted,
            gaps=self._gaps + out,
            gap_seconds=self._gap_seconds + (leap.batch * lasted if leap else 0.0),
        )

    # -- steps ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        now = self.clock.now
        self._next = None
        if self._alarm:
            self._alarm.cancel()
        self._leap = self.engine.leap(now) if self._leaping else None
        if self._leap:
            self._next = self.clock.call_at(self._leap.end(self._leap.steps), self._leapt)
            return
        step = self.engine.step(now)
        self._preemptions += len(step.preempted)
        for request in step.transfers:
            seconds = self.engine.profile.transfer_time(request.transfer_tokens)
            self.clock.call_at(now + seconds, partial(self._arrived, request))
        if not step.idle:
            self._next = self.clock.call_at(now + step.duration, partial(self._stepped, step))
        elif self.engine.queued and (expiry := self.engine.next_expiry()) is not None:
            # At rest for want of blocks, until a lease ends if nothing else happens.
            self._alarm = self.clock.call_at(expiry, self._interrupt)

    def _stepped(self, step: Step) -> None:
        self._generation_tokens += len(step.outputs)
        following = sum(1 for output in step.outputs if output.index)
        self._count(step.duration, following)
        for output in step.outputs:
            if output.index and not output.finished:
                continue
            request = output.request
            job = self._jobs.get(request.request_id)
            if job is None or job.request is not request:
                continue  # aborted since the step began
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
        self._begin()

    def _leapt(self) -> None:
        leap = self._leap
        assert leap is not None
        self.engine.take(leap, leap.steps)
        self._generation_tokens += leap.steps * leap.batch
        lasted = leap.end(leap.steps) - leap.start
        self._count(lasted, leap.steps * leap.batch, lasted * leap.batch)
        self._begin()

    def _count(self, lasted: float, gaps: int, gap_seconds: float | None = None) -> None:
        self._busy += lasted
        self._gaps += gaps
        self._gap_seconds += gaps * lasted if gap_seconds is None else gap_seconds

    def _settle(self) -> None:
        """Apply those steps of a leap to the engine that have begun by now."""
        if self._leap:
            self.engine.take(self._leap, self._leap.begun(self.clock.now))

    def _interrupt(self) -> None:
        """The engine is about to be changed: what has begun ends as it would have, then all is looked at."""
        if self._leap:
            self._settle()
            if self._leap.taken < self._leap.steps and self._next:
                self._leap.steps = self._leap.taken
                self._next.cancel()
                self._next = self.clock.call_at(self._leap.end(self._leap.steps), self._leapt)
        elif self._next is None:
            self._next = self.clock.call_at(self.clock.now, self._begin)

    # -- transfers ------------------------------------------------------------------------------------

    def _arrived(self, request: EngineRequest) -> None:
        if request.state is not State.DEFERRED:
            return  # aborted on the way
        self._interrupt()
        job = self._jobs[request.request_id]
        assert job.offer is not None
        found = job.offer.source.fetch(job.offer)
        job.offer = None
        self.hand_offs[found] += 1
        if found is Fetch.GOOD:
            self.engine.transfer_done(request.request_id)
        else:
            self.engine.transfer_failed(request.request_id, recompute=True)
