"""Whose success an answer is, and whose fault an attempt that failed: D's, P's, the request's or nobody's."""

from __future__ import annotations

from collections.abc import Callable

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from .attempts import COMPARED_REFUSALS, DOUBTS, KEY_REFUSED, OF_THE_INSTANCE, FailedAttempt, Failure
from .denials import Denials
from .forward import Forward
from .lost import LostPrompts
from .patience import Patience
from .prefill_claim import MAY_BE_PREFILLS


class Blame:
    """Counts how attempts at D have ended for the instances that had part in them."""

    def __init__(
        self, registry: Registry, patience: Patience, lost: LostPrompts, clock: Callable[[], float]
    ) -> None:
        self.denials = Denials(lambda: None)
        """Of adapters, by instances that list them."""
        self._registry = registry
        self._patience = patience
        self._lost = lost
        self._clock = clock

    def failed(self, endpoint: Endpoint, attempt: FailedAttempt, forward: Forward | None) -> None:
        """Count an attempt that did not end in a whole answer with status 200.

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
        failure, ends, now = attempt.failure, self._registry.ends, self._clock()
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
                ends.doubtful(endpoint, reason, now)
        elif failure is Failure.OVERLOADED:
            ends.overloaded(endpoint, now, attempt.retry_after)
        elif failure is Failure.REFUSED:
            self._refused(endpoint, attempt, forward, now)
        elif failure in DOUBTS:
            ends.doubtful(endpoint, reason, now)
            if failure is Failure.TIMEOUT and not ends.stands_out(endpoint):
                self._patience.timed_out()
        elif attempt.status == 500 and forward is not None:
            ends.errored(endpoint, forward.errors, reason, now, hands_over if forward.errors else by)
            forward.errors += (endpoint,)
        elif failure is not Failure.UNSENT:
            ends.failed(endpoint, reason, now, by)

    def _refused(
        self, endpoint: Endpoint, attempt: FailedAttempt, forward: Forward | None, now: float
    ) -> None:
        reason = f"decode: status {attempt.status}"
        own_key = attempt.status in KEY_REFUSED and endpoint.instance.api_key is not None
        split = forward is not None and forward.prefilled
        if attempt.status == 404 and forward is not None and not self._counts(endpoint, forward):
            return
        if own_key or (split and attempt.status in OF_THE_INSTANCE):
            self._registry.ends.failed(endpoint, reason, now)
        elif forward is not None and forward.comparable and attempt.status in COMPARED_REFUSALS:
            self._registry.ends.doubtful(endpoint, reason, now)

    def _counts(self, endpoint: Endpoint, forward: Forward) -> bool:
        """Whether a 404 counts against an endpoint."""
        return self.denials.count(endpoint, forward.decision.model, self._clock())

    def lost(self, instance: str, attempt: FailedAttempt, forward: Forward) -> None:
        """Count a connection that a request has lost after it was delivered, or what may have been one."""
        # Whose fault it is, is not known while D waits for P.
        waited = forward.beside is not None and not forward.beside.sent
        now = self._clock()
        if attempt.failure is Failure.RESET:
            forward.losses += 1
            self._lost.lost(forward.prompt, instance, now)
        elif attempt.status == 500 and not waited:
            forward.losses += 1
            self._lost.suspect(forward.prompt, instance, now)
        if forward.sidecar is not None and attempt.failure is Failure.STATUS:
            self._lost.suspect(forward.prompt, forward.sidecar.endpoint.instance.instance_id, now)

    def served(self, forward: Forward, answering: Endpoint) -> None:
        """Count a whole answer."""
        ends, now = self._registry.ends, self._clock()
        ends.succeeded(answering, None if forward.failed_attempts else forward.hands_over)
        if forward.sidecar is not None and not forward.failed_attempts:
            forward.sidecar.served()
        self._patience.answered()
        if self._lost:
            self._lost.answered(forward.prompt)
        if forward.refused_by is not None:
            # D serves what P has refused. Only some refusals cannot be due to what P is asked in its place.
            reason = f"prefill: status {forward.refused_status}, where decode serves"
            if forward.refused_status == 404 and not self._counts(forward.refused_by, forward):
                return
            if forward.refused_status in OF_THE_INSTANCE:
                ends.failed(forward.refused_by, reason, now)
            else:
                ends.doubtful(forward.refused_by, reason, now)
