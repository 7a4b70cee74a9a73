"""A request of a trace on its way through a replay, and its result."""

from __future__ import annotations

from dataclasses import dataclass

from ..fleet.endpoint import Endpoint
from ..fleet.reservation import Reservation
from ..models import InstanceRole
from ..request.context import RequestContext
from .result import RequestResult
from .schedulers import OneScheduler
from .trace import TraceRequest


@dataclass(slots=True)
class _Fetch:
    """What D has to fetch of a hand-off."""

    at: float
    """When it was asked to."""
    tokens: float
    step: float
    """Predicted seconds of a decode step there."""


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request of the trace, from its arrival to its end."""

    number: int
    """Its place in the trace."""
    traced: TraceRequest
    context: RequestContext
    at: OneScheduler
    """Which scheduler has it."""
    sent: float
    """When it came."""
    prefill: Endpoint | None = None
    decode: Endpoint | None = None
    cached: int = 0
    """Prompt tokens that were cached where the prefill was done."""
    first_token: float | None = None
    reservation: Reservation | None = None
    """On P until the prefill has ended, then on D."""
    early: Reservation | None = None
    """On a D that was chosen before the prefill."""
    _fetch: _Fetch | None = None

    def to_decode(self, now: float) -> None:
        """Take a place at a D with what P has handed over, unless that was done before the prefill."""
        context, early = self.context, self.early
        decode = self.decode if early else None
        if decode is None:
            [decode] = self.at.scheduler.pick(InstanceRole.DECODE, context, beside=self.prefill)
        step = decode.decode.step(decode.requests + 1, decode.kv_tokens + context.prompt_tokens)
        self._fetch = _Fetch(now, context.uncached(decode.holder), step)
        self.decode, self.early = decode, None
        self.reservation = early or self.at.registry.work.reserve(decode, context)

    def answers(self, at: float) -> None:
        """Note the answer's first token, from which the scheduler learns as from what Envoy tells it."""
        self.first_token, fetch = at, self._fetch
        if fetch is not None and self.prefill is not None and self.decode is not None:
            took, learning = at - fetch.at, self.at.registry.learning
            learning.first_byte(self.prefill, self.decode, fetch.tokens, fetch.step, took)

    def result(self, now: float, reason: str | None) -> RequestResult:
        """Return how it has ended: with a whole answer, or with ``reason`` for none."""
        traced, first = self.traced, self.first_token
        tpot = None
        if reason is None and first is not None and traced.output_tokens > 1:
            tpot = (now - first) / (traced.output_tokens - 1)
        return RequestResult(
            self.sent,
            traced.prompt_tokens,
            traced.output_tokens,
            self.cached,
            None if first is None or reason is not None else first - self.sent,
            tpot,
            self.prefill.id if self.prefill else None,
            self.decode.id if self.decode else None,
            now if reason is None else None,
            reason,
        )
