"""What was sent to decode and has not ended, and what Envoy tells of it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from functools import partial

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..fleet.reservation import Reservation
from ..models import InstanceRole
from ..records.decision import Decision
from ..records.recording import Recording
from ..telemetry import Ending, Stray, Telemetry
from .attempts import HANDOFF_NOT_FETCHED, NOT_ANSWERED, FailedAttempt, Failure, Retry
from .blame import Blame
from .ended import EndedRequests
from .forward import Forward
from .later import Later, in_this_loop
from .lost import MAX_LOSSES, LostPrompts
from .patience import Patience
from .prefill_claim import PrefillClaim
from .result import Result
from .unused_handoffs import UnusedHandoffs

LEFT_S = 1.0
"""How long D gets to fetch or to drop a hand-off whose client has left, before it is freed."""


class RequestsInFlight:
    """Keeps what was sent to decode by the ids under which Envoy tells of its attempts.

    ``changed`` is called when one has ended. With a ``name`` the ids begin with it and a dot. A request that
    has ended counts for its D a moment later, if nothing else was told of it until then: as a success.
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
        self.pass_on: Callable[[FailedAttempt | Result], None] = _keep
        """Takes what is told of a request that another scheduler has."""
        self.lost = LostPrompts()
        self.patience = Patience()
        self.handoffs = UnusedHandoffs(registry, telemetry)
        self.blame = Blame(registry, self.patience, self.lost, clock)
        self.ended = EndedRequests(self.blame, self.handoffs, clock, later)
        self._registry = registry
        self._telemetry = telemetry
        self._recording = recording
        self._clock = clock
        self._changed = changed
        self._later = later
        self._running: dict[str, Forward] = {}
        # Keeps our ids apart from those of a scheduler before a restart. By a name Envoy knows ours.
        self._name = f"{name}." if name else ""
        self._run = f"{self._name}{secrets.token_hex(4)}-"
        self._numbers = itertools.count()
        registry.changes.subscribe(self._look_for_the_dead)

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
        forward = Forward(
            f"{self._run}{next(self._numbers)}",
            decode,
            reservation,
            body,
            first_byte_timeout=first_byte_timeout,
            remove_headers=remove_headers,
            decision=decision,
            on_release=self._released,
        )
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
        """Take what Envoy tells of an attempt that did not end in a whole answer with status 200.

        See :meth:`.Blame.failed` for whose fault it is.
        """
        id_ = attempt.request or ""
        forward = self._running.get(id_) or self.ended.get(id_)
        endpoint = self._at(attempt.address, forward)
        if endpoint is not None:
            self._telemetry.decodes.attempt_failed(endpoint.id, attempt.failure)
            self.blame.failed(endpoint, attempt, forward)
        if forward is not None:
            self._failed(forward, endpoint, attempt)
        elif id_ and not self.is_ours(id_):
            self._telemetry.decodes.strayed(Stray.ATTEMPT)
            self.pass_on(attempt)
        elif attempt.failure is Failure.UNSENT:
            self.ended.unsent.add(attempt.request_id, self._clock())

    def attempt_told_of(self, attempt: FailedAttempt) -> None:
        """Note a failed attempt at a request of ours that was told to another scheduler.

        That has counted it for the instance.
        """
        id_ = attempt.request or ""
        if (forward := self._running.get(id_) or self.ended.get(id_)) is not None:
            self._failed(forward, self._at(attempt.address, forward), attempt)

    def _failed(self, forward: Forward, endpoint: Endpoint | None, attempt: FailedAttempt) -> None:
        """Note what follows from a failed attempt for its request, and for the hand-off of that."""
        tried = endpoint.id if endpoint is not None else attempt.address
        instance = endpoint.instance.instance_id if endpoint is not None else attempt.address
        forward.failed_attempts += 1
        forward.decision.decode_failed(tried, attempt.failure)
        forward.held_up = attempt.failure is Failure.TIMEOUT and not (
            endpoint is not None and self._registry.ends.stands_out(endpoint)
        )
        self.blame.lost(instance, attempt, forward)
        if forward.trace is not None:
            forward.trace.decode_failed(tried, attempt.failure, attempt.status, self._clock())
        if attempt.first and forward.sidecar is not None:
            forward.sidecar.end(self._clock(), attempt.failure)
            self._changed()
        self._follow(forward, attempt)
        if attempt.first and forward.call is not None:
            forward.call.end()
        if attempt.first and forward.pending is not None and not forward.freed:
            if attempt.failure in HANDOFF_NOT_FETCHED:
                self.handoffs.free_of(forward)
            elif attempt.failure is Failure.LEFT:
                # A D that has not begun with the request drops it, and the hand-off without a word to P.
                self._later(LEFT_S, partial(self.handoffs.free_of, forward))

    def told(self, result: Result) -> None:
        """Note how a request has ended, and how long it took. Nothing is decided by that."""
        if not self.told_of(result) and not self.is_ours(result.request):
            self._telemetry.decodes.strayed(Stray.RESULT)
            self.pass_on(result)

    def told_of(self, result: Result) -> bool:
        """Note how a request of ours has ended, whoever was told; return whether it is known."""
        forward = self._running.get(result.request) or self.ended.get(result.request)
        if forward is None:
            return False
        if forward.decision.ending is None:
            self._note_result(forward, result)
        return True

    def _note_result(self, forward: Forward, result: Result) -> None:
        ending = result.ending
        # Of an error, and of an answer that comes whole, the first byte is no first token.
        ttft = result.ttft if forward.decision.stream and 200 <= result.status < 300 else None
        endpoint = self._at(result.address, forward)
        answered_by = endpoint.id if endpoint is not None else result.address or None
        if not (forward.fits(result.address) or forward.failed_attempts):
            self.handoffs.free_of(forward)  # Envoy knew none of those who could use it
        forward.decision.ended(ending, result.status, ttft, result.duration, answered_by)
        if 200 <= result.status < 300 and forward.recorded is not None:
            kept = forward.recorded
            tokens = self._recording.answered(kept, result.answer_bytes, ttft)
            if endpoint is not None and ending is Ending.OK:
                prompt = kept.prompt_tokens
                self._registry.work.answered(endpoint, kept.blocks, kept.block_tokens, prompt, tokens)
        if forward.trace is not None:
            forward.trace.result(ending, result.status, ttft)
        self._telemetry.answers.ended(forward.served, ending, ttft, result.duration)
        revision = (endpoint or forward.decode[0]).instance.revision
        self._telemetry.by_revision.ended(revision, ending, ttft)
        if ttft is not None and result.sent is not None and endpoint is not None:
            self._learn(forward, endpoint, ttft - result.sent)

    def _learn(self, forward: Forward, endpoint: Endpoint, took: float) -> None:
        """Learn from the seconds in which D has answered the first attempt with what P has computed."""
        prefill = None if forward.failed_attempts or forward.call is not None else forward.prefill
        if prefill is None or prefill not in self._registry or endpoint not in self._registry:
            return  # what is gone has no series
        if forward.beside is not None:
            return  # what came before the first byte was the prefill too
        if forward.sidecar is not None:
            forward.sidecar.took(took, self._queued_at(forward))
            return
        self._telemetry.handoffs.used(prefill.id, endpoint.id, took)
        learning = self._registry.learning
        learning.first_byte(prefill, endpoint, forward.transferred, forward.step, took)

    def _at(self, address: str, forward: Forward | None) -> Endpoint | None:
        """Return the D at an address: of several ranks, the one that a request was sent to."""
        endpoint = self._registry.at(InstanceRole.DECODE, address)
        if endpoint is None or endpoint.rank is None or forward is None:
            return endpoint
        return next((each for each in forward.decode if each.address == address), endpoint)

    def _follow(self, forward: Forward, attempt: FailedAttempt) -> None:
        """Note who has the request now, if anybody."""
        goes_on = attempt.failure in NOT_ANSWERED or attempt.status in forward.retried
        if goes_on and attempt.failure is not Failure.CUT and forward.losses < MAX_LOSSES:
            forward.moved(self._registry, attempt.address)
            return
        if attempt.failure is Failure.REFUSED and forward.refused_by is not None:
            self._registry.ends.succeeded(forward.refused_by)  # P was right
            forward.refused_by = None
        forward.answering = None

    def _look_for_the_dead(self) -> None:
        for instance in self.lost.suspected:
            endpoint = self._registry.find(instance)
            if endpoint is None or endpoint.probes.healthy is False:
                self.lost.died(instance, self._clock())

    def may_try_again(self, request: str, made: int) -> Retry | None:
        """Return whether Envoy may try one more D after ``made`` attempts; ``None`` if that is not known yet.

        What was never delivered may be tried on all. What two instances have lost is tried on no third. What
        has timed out may be tried again if its D hangs; if D is as slow as the others, only a share of them.
        """
        forward = self._running.get(request)
        if forward is None and not self.is_ours(request):
            self._telemetry.decodes.strayed(Stray.QUESTION)
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
        self.handoffs.free_of(forward)

    def _released(self, forward: Forward) -> None:
        self._running.pop(forward.id, None)
        forward.sent()
        now = self._clock()
        if forward.trace is not None:
            forward.trace.answer_ended(now)
        if forward.call is not None:
            forward.refuse = None
            forward.call.end()
        if forward.beside is not None:
            forward.beside.released()
        if forward.sidecar is not None:
            forward.sidecar.end(now)
            forward.sidecar.endpoint.end_handoff()
        if forward.pending is not None and forward.pending.handoff.pinned:
            forward.pending.prefill.end_handoff()
        self.ended.add(forward, now)
        self._changed()

    def close_traces(self) -> None:
        """End the spans of all requests, since the process ends."""
        for forward in (*self._running.values(), *self.ended):
            forward.close_trace(self._clock())


def _keep(_: FailedAttempt | Result) -> None:
    """Pass nothing on: there is no other scheduler."""
