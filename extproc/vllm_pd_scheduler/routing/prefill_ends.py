"""How attempts to have a request prefilled end: what that says of P, and what becomes of the request."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from ..config import SchedulerConfig
from ..connectors import Attempt, ConnectorFailed, Handoff
from ..fleet.endpoint import Endpoint
from ..fleet.reservation import Reservation
from ..handoff.interfaces import LocalShortage, PrefillAnswer, PrefillFailed, PrefillNotSent
from ..handoff.pending import PendingHandoff
from ..records.decision import OK
from ..request.context import RequestContext
from ..request.errors import Reject, reject
from ..scheduler import Scheduler
from ..scheduler.kv_source import KvSources
from ..telemetry import Telemetry
from ..telemetry.pace import Pace
from ..tracing import current
from .attempts import KEY_REFUSED, Failure, failure_of_status
from .local_errors import LocalErrors
from .lost import MAX_LOSSES, PAUSE_S, LostPrompts
from .time_limits import handoff_deadline
from .tried import Outcome, PrefillTry, Tried, WithoutHandoff, lost_twice, no_prefill

log = logging.getLogger(__name__)

_STILL_AT_IT = frozenset({"timeout", "hung"})
"""Failures of a P that may go on with the request."""

_MAY_BE_THE_SOURCE = frozenset({"timeout", "hung", "reset", "status_500"})
"""Failures of a P that was to pull a part of the prompt for which the other instance may be the reason."""


class PrefillEnds:
    """Counts how attempts end, learns from them, and says what follows: ``None`` is another attempt.

    ``decode_may_not_prefill`` says so of a request, by what it has tried. ``forget_answers`` drops what a P
    has answered to its connector's question, since it may be another process now.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        telemetry: Telemetry,
        lost: LostPrompts,
        local_errors: LocalErrors,
        sources: KvSources,
        decode_may_not_prefill: Callable[[Tried], bool],
        forget_answers: Callable[[Endpoint], None],
        clock: Callable[[], float],
    ) -> None:
        self.on_token_ids: Callable[[RequestContext, bytes], None] | None = None
        """Called with the token ids of a prompt, a JSON array, where P has told them."""
        self._config = config
        self._registry = scheduler.registry
        self._telemetry = telemetry
        self._lost = lost
        self._local_errors = local_errors
        self._sources = sources
        self._decode_may_not_prefill = decode_may_not_prefill
        self._forget_answers = forget_answers
        self._pace = Pace(clock)
        self._clock = clock

    def over(self, one: PrefillTry) -> None:
        """Give back what an attempt has taken on P, when it is over."""
        now, noted, reservation = self._clock(), one.noted, one.reservation
        noted.took = now - reservation.at
        if noted.outcome in _MAY_BE_THE_SOURCE:
            self._pull_ended(reservation, 0)
        reservation.release(now)

    def answered(self, one: PrefillTry, attempt: Attempt, answer: PrefillAnswer) -> Outcome | None:
        """Note an attempt that P has answered."""
        self._telemetry.prefills.took(one.endpoint.id, self._clock() - one.sent_at)
        if answer.status == 200:
            one.noted.outcome = OK
            return self._handed_over(one, attempt, answer)
        one.noted.outcome = f"status_{answer.status}"
        return self._not_200(one.endpoint, one.context.fingerprint, answer, one.tried)

    def unanswered(self, one: PrefillTry, error: ConnectorFailed | PrefillFailed) -> Outcome | None:
        """Note an attempt that has no answer, or none that its connector could read."""
        noted, tried, endpoint = one.noted, one.tried, one.endpoint
        if isinstance(error, ConnectorFailed):  # which says nothing of the instance
            noted.outcome = "connector"
            return WithoutHandoff(failed=False)
        if isinstance(error, LocalShortage):
            noted.outcome = "local_resources"
            self._local_errors.add(str(error))
            return reject(503, "The scheduler's machine is short of resources.", "local_resources")
        if isinstance(error, PrefillNotSent):
            noted.outcome = "not_sent"
            self._local_errors.add(str(error))
            tried.only_full = False
            return None
        noted.outcome = str(error)
        self._failed(endpoint, str(error), tried)
        self._forget_answers(endpoint)
        tried.may_have_written = tried.may_have_written or error.args[0] != "connect"
        lost = self._lose(endpoint, one.context.fingerprint, tried) if error.lost else None
        # One that is alive may write to D all the same, and later than another one has: when the blocks are
        # another prompt's.
        return no_prefill() if tried.asked is not None and error.args[0] in _STILL_AT_IT else lost

    def _handed_over(self, one: PrefillTry, attempt: Attempt, answer: PrefillAnswer) -> Outcome | None:
        endpoint, context, tried = one.endpoint, one.context, one.tried
        try:
            handoff = attempt.handoff(answer.body)
        except ConnectorFailed:
            self._telemetry.handoffs.stranded(endpoint.id)  # there may be one
            raise
        if handoff is not None:
            self._registry.ends.succeeded(endpoint)
            self._registry.speaks(endpoint, handoff.protocol, handoff.takes_token_ids)
            now = self._clock()
            self._learn(one.reservation, context, handoff, now)
            if handoff.token_ids and self.on_token_ids is not None:
                self.on_token_ids(context, handoff.token_ids)
            deadline = handoff_deadline(self._config, now, handoff.lease)
            return PendingHandoff(
                handoff, endpoint, attempt, deadline, context.model, tried.decode, tried.losses
            )
        if attempt.ended(answer.body):
            self._registry.ends.succeeded(endpoint)
            return WithoutHandoff(failed=False)
        one.noted.outcome = "no_handoff"
        if (trace := current.get()) is not None:
            trace.prefill_useless("no_handoff")
        words = (
            "no hand-off in its answer: has it a --kv-transfer-config, with the connector that is set here?"
        )
        if self._pace.due("no_handoff"):
            log.warning("%s: %s (logged at most once a minute)", endpoint.id, words)
        self._failed(endpoint, "no_handoff", tried, words)
        return None

    def _not_200(
        self, endpoint: Endpoint, fingerprint: int, answer: PrefillAnswer, tried: Tried
    ) -> Outcome | None:
        failure = failure_of_status(answer.status)
        if failure is Failure.OVERLOADED:
            self._telemetry.prefills.failed(endpoint.id, f"status_{answer.status}")
            self._registry.ends.overloaded(endpoint, self._clock(), answer.retry_after)
            return None
        own_key = answer.status in KEY_REFUSED and endpoint.instance.api_key is not None
        if failure is not Failure.REFUSED or own_key:
            tried.may_have_written = True
            if answer.status == 500:
                self._errored(endpoint, fingerprint, tried)
            else:
                self._failed(endpoint, f"status_{answer.status}", tried)
            return self._lose(endpoint, fingerprint, tried) if b"EngineCore" in answer.body else None
        tried.only_full = False
        if not self._decode_may_not_prefill(tried):
            # P was asked for one token, not streamed: only D sees the request as the client wrote it.
            return WithoutHandoff(False, endpoint, answer.status)
        agreed = tried.refusal is not None and tried.refusal.status == answer.status
        kept = {**answer.headers, "content-type": answer.content_type}
        tried.refusal = Reject(answer.status, answer.body, kept, "prefill_4xx")
        return tried.refusal if agreed else None

    def _lose(self, endpoint: Endpoint, fingerprint: int, tried: Tried) -> Reject | None:
        """Count a request that was delivered and lost; return the answer if it must not be tried again.

        That is so as well if others with its prompt have taken the second instance meanwhile.
        """
        tried.losses += 1
        now = self._clock()
        self._lost.lost(fingerprint, endpoint.instance.instance_id, now)
        refused_for = self._lost.refused_for(fingerprint, now)
        if tried.losses < MAX_LOSSES and not refused_for:
            return None
        return lost_twice(math.ceil(refused_for) or int(PAUSE_S))

    def _errored(self, endpoint: Endpoint, fingerprint: int, tried: Tried) -> None:
        """Count a 500: a bug of the instance's, or the first sign that it dies, or due to the request."""
        tried.only_full = False
        now = self._clock()
        self._telemetry.prefills.failed(endpoint.id, "status_500")
        self._lost.suspect(fingerprint, endpoint.instance.instance_id, now)
        self._registry.ends.errored(endpoint, tried.errors, "prefill: status_500", now)
        tried.errors += (endpoint,)

    def _failed(self, endpoint: Endpoint, reason: str, tried: Tried, words: str = "") -> None:
        tried.only_full = False
        self._telemetry.prefills.failed(endpoint.id, reason)
        self._registry.ends.failed(endpoint, f"prefill: {words or reason}", self._clock())

    def _pull_ended(self, reservation: Reservation, cached: int | None) -> None:
        """Note how a prefill has ended that was to pull, and what P says that was cached of the prompt."""
        if reservation.source is not None:
            paid = self._sources.ended(reservation, cached, self._clock())
            self._telemetry.prefills.prefix_pulled(reservation.source.id, reservation.pulled, paid)

    def _learn(self, reservation: Reservation, context: RequestContext, handoff: Handoff, now: float) -> None:
        """Learn from a prefill how long it took, and how long the prompt was."""
        tokens = handoff.prompt_tokens
        if reservation.source is not None:
            self._pull_ended(reservation, handoff.cached_tokens)
        if tokens is None or tokens < 1:
            return
        took = now - reservation.at
        if took > 0:
            predicted = reservation.wait + reservation.cost
            self._telemetry.prefills.predicted(reservation.endpoint.id, predicted / took)
        self._telemetry.prefills.prompt_read(
            tokens, reservation.cached + reservation.pulled, handoff.cached_tokens
        )
        self._registry.work.prefilled(reservation, tokens, handoff.cached_tokens, now)
        self._registry.load.learn_bytes(context.model, context.prompt_bytes, tokens)
        context.counted(tokens)
