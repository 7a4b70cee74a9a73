"""What was sent to decode and has not ended, and what became of it: whose success, and whose hand-off."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections import deque
from collections.abc import Callable
from functools import partial

from ..fleet.endpoint import Endpoint, Reservation
from ..fleet.registry import Registry
from ..handoff.interfaces import ReleaseHandoff
from ..handoff.pending import PendingHandoff
from ..models import InstanceRole
from ..records.decision import Decision
from ..records.recording import Recording
from ..telemetry import Ending, Stray, Telemetry
from .attempts import (
    COMPARED_REFUSALS,
    DOUBTS,
    HANDOFF_NOT_FETCHED,
    KEY_REFUSED,
    NOT_ANSWERED,
    OF_THE_INSTANCE,
    FailedAttempt,
    Failure,
    Retry,
)
from .denials import Denials
from .forward import Forward
from .lost import MAX_LOSSES, LostPrompts
from .never_sent import NeverSent
from .patience import Patience
from .prefill_claim import MAY_BE_PREFILLS, PrefillClaim
from .result import Result

SETTLE_S = 0.25
"""How long after the end of a request its outcome is counted. Envoy tells of failures on another connection
than of ends: 0.2 ms later on an idle machine, seen up to some 10 ms on a busy one."""

LEFT_S = 1.0
"""How long D gets to fetch or to drop a hand-off whose client has left, before it is freed."""

REMEMBERED_S = 3.0
"""How long a request that has ended is remembered, for what Envoy may still tell of it."""

MAX_REMEMBERED_BYTES = 64 << 20
"""And how many bytes of hand-offs at most; one of a prompt of 128k tokens has some 50 KB."""

Later = Callable[[float, Callable[[], None]], object]
"""Calls something after so many seconds."""


def in_this_loop(delay: float, call: Callable[[], None]) -> object:
    """Call something in the running event loop after ``delay`` seconds.

    A script that uses the library has no loop between its calls: nothing is told later there.
    """
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop().call_later(delay, call)
    return None


class RequestsInFlight:
    """Keeps what was sent to decode by the ids under which Envoy tells of its attempts.

    ``changed`` is called when one has ended. ``release_handoff`` frees a hand-off on its P; without it, it is
    left to the lease. With a ``name`` the ids begin with it and a dot. A request that has ended counts for
    its D a moment later, if nothing else was told of it until then: as a success; see :meth:`attempt_failed`
    for what else it can be.
    """

    def __init__(
        self,
        registry: Registry,
        telemetry: Telemetry,
        recording: Recording,
        clock: Callable[[], float],
        changed: Callable[[], None],
        later: Later = in_this_loop,
        name: str = "",
    ) -> None:
        self.release_handoff: ReleaseHandoff | None = None
        self.lost = LostPrompts()
        self.patience = Patience()
        self.denials = Denials(lambda: None)
        """Of adapters, by instances that list them."""
        self._registry = registry
        self._telemetry = telemetry
        self._recording = recording
        self._clock = clock
        self._changed = changed
        self._later = later
        self._running: dict[str, Forward] = {}
        self._ended: dict[str, Forward] = {}
        self._left = NeverSent()
        self._unsettled: deque[tuple[float, Forward]] = deque()
        self._remembered: deque[tuple[float, Forward]] = deque()
        self._remembered_bytes = 0
        self._waking = False
        # Keeps our ids apart from those of a scheduler before a restart. By a name Envoy knows ours.
        self._name = f"{name}." if name else ""
        self._run = f"{self._name}{secrets.token_hex(4)}-"
        self._numbers = itertools.count()
        registry.subscribe(self._look_for_the_dead)

    def start(
        self,
        decode: list[Endpoint],
        reservation: Reservation,
        body: bytes | None,
        first_byte_timeout: float | None,
        remove_headers: list[str],
        decision: Decision,
    ) -> Forward:
        """Return a forward to the first of ``decode``, on which the reservation is; see :class:`Forward`."""
        forward = Forward(f"{self._run}{next(self._numbers)}", decode, reservation, body, decision=decision)
        forward.first_byte_timeout = first_byte_timeout
        forward.remove_headers = remove_headers
        forward.on_release = self._released
        self._running[forward.id] = forward
        self.patience.requested()
        return forward

    def claimed(self, forward: Forward, claim: PrefillClaim) -> None:
        """Note the claim of a forward on the P that the sidecar at its D asks."""
        forward.sidecar = claim
        claim.endpoint.keep_handoff()
        self._later(claim.predicted, partial(self._expired, claim))

    def _expired(self, claim: PrefillClaim) -> None:
        claim.expired(self._clock())
        self._changed()

    def is_ours(self, request: str) -> bool:
        """Whether an id is of this run: not another scheduler's, nor that of one before a restart."""
        return request.startswith(self._run)

    def is_for_us(self, request: str) -> bool:
        """Whether no other scheduler can have the request of an id; this one may have, before a restart."""
        return request.startswith(self._name or self._run)

    def running(self, request: str) -> Forward | None:
        """Return what was sent to decode under an id of ours, and has not ended."""
        return self._running.get(request)

    def in_vain(self, request: str) -> bool:
        """Whether P has failed a request whose D is answering: it has been told to end that."""
        forward = self._running.get(request)
        return forward is not None and forward.beside is not None and forward.beside.failed

    def answer_began(self, forward: Forward, status: int) -> None:
        """Note that the answer to a request has begun, where Envoy tells that before it has ended."""
        if forward.sidecar is not None:
            if status == 200:
                forward.sidecar.began(not forward.stream, self._queued_at(forward), self._clock())
            else:
                forward.sidecar.end(self._clock(), f"status_{status}")
            self._changed()

    @staticmethod
    def _queued_at(forward: Forward) -> bool:
        """Whether requests wait in the queue of a forward's D, as last scraped."""
        metrics = forward.decode[0].metrics
        return metrics is None or metrics.waiting > 0

    def attempt_failed(self, attempt: FailedAttempt) -> None:
        """Count what Envoy tells of an attempt that did not end in a whole answer with status 200.

        ============================  =================================================================
        no connection, reset, 5xx,    a failure of the instance; a 500 is none if another instance, P or D,
        cut                           has answered 500 to the request too
        401 or 403 to our own key;    a failure too: it is not what the rest of the fleet is
        401, 403, 404 after P's 200
        429, 503                      neither: the instance is full, and is left alone for a while
        time-out, other 4xx, client   nothing by itself; if its peers have few such ends and it has
        that left before any answer   many, the instance is ejected
        no attempt at all             nothing
        ============================  =================================================================
        """
        id_ = attempt.request or ""
        forward = self._running.get(id_) or self._ended.get(id_)
        endpoint = self._at(attempt.address, forward)
        if endpoint is not None:
            self._telemetry.attempt_failed(endpoint.id, attempt.failure)
            self._count(endpoint, attempt, forward)
        if forward is None:
            if id_ and not self.is_ours(id_):
                self._telemetry.strayed(Stray.ATTEMPT)
            elif attempt.failure is Failure.UNSENT:
                self._left.add(attempt.request_id, self._clock())
            return
        forward.failed_attempts += 1
        forward.decision.decode_failed(endpoint.id if endpoint else attempt.address, attempt.failure)
        forward.held_up = attempt.failure is Failure.TIMEOUT and not (
            endpoint is not None and self._registry.stands_out(endpoint)
        )
        instance = endpoint.instance.instance_id if endpoint is not None else attempt.address
        # Whose fault it is, is not known while D waits for P.
        waited = forward.beside is not None and not forward.beside.sent
        if attempt.failure is Failure.RESET:
            forward.losses += 1
            self.lost.lost(forward.prompt, instance, self._clock())
        elif attempt.status == 500 and not waited:
            forward.losses += 1
            self.lost.suspect(forward.prompt, instance, self._clock())
        if forward.sidecar is not None and attempt.failure is Failure.STATUS:
            self.lost.suspect(forward.prompt, forward.sidecar.endpoint.instance.instance_id, self._clock())
        if forward.trace is not None:
            tried = endpoint.id if endpoint is not None else attempt.address
            forward.trace.decode_failed(tried, attempt.failure, attempt.status, self._clock())
        if attempt.first and forward.sidecar is not None:
            forward.sidecar.end(self._clock(), attempt.failure)
            self._changed()
        self._follow(forward, attempt)
        if attempt.first and forward.call is not None:
            forward.call.end()
        if attempt.first and forward.pending is not None and not forward.freed:
            if attempt.failure in HANDOFF_NOT_FETCHED:
                self._free(forward)
            elif attempt.failure is Failure.LEFT:
                # A D that has not begun with the request drops it, and the hand-off without a word to P.
                self._later(LEFT_S, partial(self._free, forward))

    def told(self, result: Result) -> None:
        """Note how a request has ended, and how long it took. Nothing is decided by that."""
        forward = self._running.get(result.request) or self._ended.get(result.request)
        if forward is None and not self.is_ours(result.request):
            self._telemetry.strayed(Stray.RESULT)
        if forward is None or forward.decision.ending is not None:
            return
        ending = result.ending
        # Of an error, and of an answer that comes whole, the first byte is no first token.
        ttft = result.ttft if forward.decision.stream and 200 <= result.status < 300 else None
        endpoint = self._at(result.address, forward)
        answered_by = endpoint.id if endpoint is not None else result.address or None
        if not (forward.fits(result.address) or forward.failed_attempts):
            self._free(forward)  # Envoy knew none of those who could use it
        forward.decision.ended(ending, result.status, ttft, result.duration, answered_by)
        if 200 <= result.status < 300 and forward.recorded is not None:
            tokens = self._recording.answered(forward.recorded, result.answer_bytes, ttft)
            if endpoint is not None and ending is Ending.OK:
                kept = forward.recorded
                self._registry.answered(endpoint, kept.blocks, kept.block_tokens, kept.prompt_tokens, tokens)
        if forward.trace is not None:
            forward.trace.result(ending, result.status, ttft)
        self._telemetry.ended(forward.served, ending, ttft, result.duration)
        revision = (endpoint or forward.decode[0]).instance.revision
        self._telemetry.by_revision.ended(revision, ending, ttft)
        prefill = None if forward.failed_attempts or forward.call is not None else forward.prefill
        if prefill is None or endpoint is None:
            return
        if prefill not in self._registry or endpoint not in self._registry:
            return  # what is gone has no series
        if forward.beside is not None:
            return  # what came before the first byte was the prefill too
        if ttft is not None and result.sent is not None:
            took = ttft - result.sent
            if forward.sidecar is None:
                self._telemetry.handed_off(prefill.id, endpoint.id, took)
                if not self._queued_at(forward):
                    seconds = took - forward.step
                    self._registry.load.transfers.learn(prefill.id, endpoint.id, forward.transferred, seconds)
            else:
                forward.sidecar.took(took, self._queued_at(forward))

    def _at(self, address: str, forward: Forward | None) -> Endpoint | None:
        """Return the D at an address: of several ranks, the one that a request was sent to."""
        endpoint = self._registry.at(InstanceRole.DECODE, address)
        if endpoint is None or endpoint.rank is None or forward is None:
            return endpoint
        return next((each for each in forward.decode if each.address == address), endpoint)

    def _count(self, endpoint: Endpoint, attempt: FailedAttempt, forward: Forward | None) -> None:
        failure, registry, now = attempt.failure, self._registry, self._clock()
        reason = f"decode: {failure}"
        if forward is not None and forward.call is not None and forward.call.refused:
            return  # D has waited for P in vain
        claim = forward.sidecar if forward is not None and attempt.first else None
        hands_over = forward.hands_over if forward is not None else None
        by = hands_over if attempt.first and failure is Failure.STATUS else None
        if claim is not None and failure in MAY_BE_PREFILLS:
            claim.doubtful(endpoint, f"prefill or {reason}", now)
        elif attempt.status == 500 and forward is not None and forward.beside and not forward.beside.sent:
            if not forward.beside.failed:  # else it was made to, since P has failed
                registry.doubtful(endpoint, reason, now)
        elif failure is Failure.OVERLOADED:
            registry.overloaded(endpoint, now, attempt.retry_after)
        elif failure is Failure.REFUSED:
            reason = f"decode: status {attempt.status}"
            own_key = attempt.status in KEY_REFUSED and endpoint.instance.api_key is not None
            split = forward is not None and forward.prefilled
            if attempt.status == 404 and forward is not None and not self._counts(endpoint, forward):
                return
            if own_key or (split and attempt.status in OF_THE_INSTANCE):
                registry.failed(endpoint, reason, now)
            elif forward is not None and forward.comparable and attempt.status in COMPARED_REFUSALS:
                registry.doubtful(endpoint, reason, now)
        elif failure in DOUBTS:
            registry.doubtful(endpoint, reason, now)
            if failure is Failure.TIMEOUT and not registry.stands_out(endpoint):
                self.patience.timed_out()
        elif attempt.status == 500 and forward is not None:
            registry.errored(endpoint, forward.errors, reason, now, hands_over if forward.errors else by)
            forward.errors += (endpoint,)
        elif failure is not Failure.UNSENT:
            registry.failed(endpoint, reason, now, by)

    def _counts(self, endpoint: Endpoint, forward: Forward) -> bool:
        """Whether a 404 counts against an endpoint."""
        return self.denials.count(endpoint, forward.decision.model, self._clock())

    def _follow(self, forward: Forward, attempt: FailedAttempt) -> None:
        """Note who has the request now, if anybody."""
        goes_on = attempt.failure in NOT_ANSWERED or attempt.status in forward.retried
        if goes_on and attempt.failure is not Failure.CUT and forward.losses < MAX_LOSSES:
            forward.moved(self._registry, attempt.address)
            return
        if attempt.failure is Failure.REFUSED and forward.refused_by is not None:
            self._registry.succeeded(forward.refused_by)  # P was right
            forward.refused_by = None
        forward.answering = None

    def _look_for_the_dead(self) -> None:
        for instance in self.lost.suspected:
            endpoint = next((e for e in self._registry if e.instance.instance_id == instance), None)
            if endpoint is None or endpoint.healthy is False:
                self.lost.died(instance, self._clock())

    def may_try_again(self, request: str, made: int) -> Retry | None:
        """Return whether Envoy may try one more D after ``made`` attempts; ``None`` if that is not known yet.

        What was never delivered may be tried on all. What two instances have lost is tried on no third. What
        has timed out may be tried again if its D hangs; if D is as slow as the others, only a share of them.
        """
        forward = self._running.get(request)
        if forward is None and not self.is_ours(request):
            self._telemetry.strayed(Stray.QUESTION)
            return Retry.UNKNOWN
        if forward is None or forward.losses >= MAX_LOSSES or self._refused(forward):
            return Retry.LOST
        if forward.failed_attempts < made:
            return None
        if forward.held_up and not self.patience.may_retry():
            forward.answering = None
            return Retry.SLOW
        return Retry.LAST if forward.losses == MAX_LOSSES - 1 else Retry.ALLOWED

    def _refused(self, forward: Forward) -> bool:
        """Whether others with the prompt of a request that an instance has lost have taken a second one."""
        return bool(forward.losses and self.lost.refused_for(forward.prompt, self._clock()))

    def unused(self, forward: Forward) -> None:
        """Forget a forward that will not be sent: the client left before Envoy could."""
        forward.answering, forward.decision.ending = None, Ending.LEFT
        forward.release()
        if forward.pending is not None:
            self._free(forward)

    def free(self, pending: PendingHandoff) -> None:
        """Free a hand-off that nobody will use."""
        if not pending.handoff.pinned:
            return
        if self.release_handoff is not None:
            self.release_handoff(pending)
        else:
            self._stranded(pending)

    def _free(self, forward: Forward) -> None:
        """Free a forward's hand-off, once."""
        if forward.pending is not None and not forward.freed:
            forward.freed = True
            self.free(forward.pending)

    def _released(self, forward: Forward) -> None:
        self._running.pop(forward.id, None)
        forward.sent()
        now = self._clock()
        if forward.trace is not None:
            forward.trace.answer_ended(now)
        self._ended[forward.id] = forward
        self._unsettled.append((now, forward))
        if forward.call is not None:
            forward.refuse = None
            forward.call.end()
        if forward.beside is not None:
            forward.beside.released()
        if forward.sidecar is not None:
            forward.sidecar.end(now)
            forward.sidecar.endpoint.end_handoff()
        if forward.pending is not None:
            if forward.pending.handoff.pinned:
                forward.pending.prefill.end_handoff()
            self._remembered_bytes += len(forward.pending.handoff.params)
        self._remembered.append((now, forward))
        self.settle()
        self._changed()

    def settle(self, after: float = SETTLE_S) -> None:
        """Count the requests that ended ``after`` seconds ago, and forget those of a while before."""
        now = self._clock()
        while self._unsettled and self._unsettled[0][0] <= now - after:
            self._settle(self._unsettled.popleft()[1])
        while self._remembered and (
            self._remembered[0][0] <= now - REMEMBERED_S or self._remembered_bytes > MAX_REMEMBERED_BYTES
        ):
            self._forget(self._remembered.popleft()[1])
        if (self._unsettled or self._remembered) and not self._waking:
            self._waking = True
            self._later(SETTLE_S if self._unsettled else REMEMBERED_S, self._wake)

    def _wake(self) -> None:
        self._waking = False
        self.settle()

    def _forget(self, forward: Forward) -> None:
        self._ended.pop(forward.id, None)
        self._close_trace(forward)
        if forward.pending is None:
            return
        self._remembered_bytes -= len(forward.pending.handoff.params)
        if self._never_sent(forward):
            self._take_back(forward)

    def close_traces(self) -> None:
        """End the spans of all requests, since the process ends."""
        for forward in (*self._running.values(), *self._ended.values()):
            self._close_trace(forward)

    def _close_trace(self, forward: Forward) -> None:
        if forward.trace is None:
            return
        if (answering := forward.answering) is None:
            forward.trace.close(self._clock())
        else:
            forward.trace.close(self._clock(), answering.id, answering.url)

    def _never_sent(self, forward: Forward) -> bool:
        """Whether its client left before Envoy had our answer, so that no D has been asked."""
        return not forward.failed_attempts and self._left.has(forward.request_id, self._clock())

    def _take_back(self, forward: Forward) -> None:
        """Free the hand-off of a request that was never sent; leave it to the lease if that is not sure."""
        if forward.ended_by_envoy:
            self._free(forward)
        else:
            self.leave_to_lease(forward)

    def leave_to_lease(self, forward: Forward) -> None:
        """Free the hand-off of a request by nothing but the end of its lease: its D may be using it."""
        if forward.pending is not None and not forward.freed:
            forward.freed = True
            self._stranded(forward.pending)

    def _stranded(self, pending: PendingHandoff) -> None:
        if pending.prefill in self._registry:  # what is gone has no series
            self._telemetry.handoff_stranded(pending.prefill.id)

    def _settle(self, forward: Forward) -> None:
        if self._never_sent(forward):
            forward.answering, forward.decision.ending = None, Ending.LEFT
            self._take_back(forward)
        if forward.answering is None:
            return
        self._registry.succeeded(forward.answering, None if forward.failed_attempts else forward.hands_over)
        if forward.sidecar is not None and not forward.failed_attempts:
            forward.sidecar.served()
        self.patience.answered()
        if self.lost:
            self.lost.answered(forward.prompt)
        if forward.refused_by is not None:
            # D serves what P has refused. Only some refusals cannot be due to what P is asked in its place.
            reason = f"prefill: status {forward.refused_status}, where decode serves"
            if forward.refused_status == 404 and not self._counts(forward.refused_by, forward):
                return
            if forward.refused_status in OF_THE_INSTANCE:
                self._registry.failed(forward.refused_by, reason, self._clock())
            else:
                self._registry.doubtful(forward.refused_by, reason, self._clock())
