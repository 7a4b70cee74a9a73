"""The spans of one request, from its arrival to the end of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context

from . import attributes as names

_Value = str | int | float


class RequestTrace:
    """Records what happens to a request as spans.

    ``method`` and ``path`` are the request's; a ``url`` is that of an instance, without a path. All times
    that it is given are seconds of one monotonic clock; ``offset`` added to them, in nanoseconds, is the time
    since 1970. Of a request that is not sampled nothing is recorded, but the instances are told so by its
    ``traceparent``. :meth:`close` ends what has not ended; nothing is recorded after it.
    """

    __slots__ = (
        "_attempt_since",
        "_context",
        "_decode",
        "_ended_at",
        "_failed_attempts",
        "_failure",
        "_method",
        "_offset",
        "_outcome",
        "_path",
        "_prefill",
        "_prefill_attempts",
        "_prefill_ended_at",
        "_request",
        "_started_at",
        "_status",
        "_tracer",
        "_waited_until",
    )

    def __init__(
        self, tracer: Tracer, request: Span, method: str, path: str, now: float, offset: int
    ) -> None:
        self._tracer = tracer
        self._request = request
        self._method = method
        self._path = path
        self._context = set_span_in_context(request, Context())
        self._offset = offset
        self._started_at = self._waited_until = self._attempt_since = now
        self._ended_at: float | None = None
        self._prefill: Span | None = None
        self._prefill_ended_at: float | None = None
        self._prefill_attempts = 0
        self._decode: Span | None = None
        self._failed_attempts = 0
        self._failure = ""
        self._status = 0
        self._outcome = ""

    # -- before decode

    def asks_for(self, model: str) -> None:
        """Note the name of the model in its body."""
        self._request.set_attribute(names.MODEL, names.text(model))

    def waited(self, role: str, outcome: str, since: float, now: float) -> None:
        """Record that it waited in the queue; ``outcome`` as in ``pd_scheduler_queue_wait_seconds``."""
        self._waited_until = now
        self._span("queue", {names.ROLE: role, names.OUTCOME: outcome}, since).end(self._at(now))

    def picked(
        self,
        role: str,
        strategy: str,
        instance: str,
        since: float,
        now: float,
        predicted: float | None = None,
    ) -> None:
        """Record a pick, with the seconds to the end of the prefill as they are predicted.

        A request that has waited is picked for at the end of its wait.
        """
        found: dict[str, _Value] = {names.ROLE: role, names.STRATEGY: strategy, names.INSTANCE: instance}
        if predicted is not None:
            found[names.PREDICTED] = predicted
        self._span(f"pick {role}", found, max(since, self._waited_until)).end(self._at(now))

    def encode_sent(self, instance: str, url: str, now: float) -> LegSpan:
        """Begin the encoding of one item; several run at a time."""
        return LegSpan(self._client_span("encode", instance, url, 0, now), self._at)

    def prefill_sent(self, instance: str, url: str, now: float) -> str:
        """Begin an attempt at a P; return the ``traceparent`` for it."""
        self._end_prefill()
        self._prefill = self._client_span("prefill", instance, url, self._prefill_attempts, now)
        self._prefill_attempts += 1
        return _traceparent(self._prefill)

    def prefill_answered(self, now: float, status: int = 0, failure: str = "") -> None:
        """End that attempt: with a status, or with the reason why there is no answer."""
        self._prefill_ended_at = now
        if self._prefill is None:
            return
        if status:
            self._prefill.set_attribute(names.HTTP_RESPONSE_STATUS_CODE, status)
        if failure or status != 200:
            _fail(self._prefill, failure or str(status))

    def prefill_useless(self, reason: str) -> None:
        """Note that the attempt that was answered last has given no hand-off."""
        if self._prefill is not None:
            _fail(self._prefill, reason)

    def rejected(self, status: int, reason: str, now: float) -> None:
        """End the trace: the scheduler has answered in an instance's place."""
        self._request.set_attribute(names.HTTP_RESPONSE_STATUS_CODE, status)
        self._request.set_attribute(names.SERVED, "rejected")
        self._request.set_attribute(names.ERROR_TYPE, reason)
        if status >= 500:
            self._request.set_status(StatusCode.ERROR)
        self._end(now)

    def broken_off(self, error: BaseException, now: float) -> None:
        """End the trace: the client has left while it was being routed, or that has failed."""
        left = not isinstance(error, Exception)
        self._request.set_attribute(names.OUTCOME, "left" if left else "error")
        if not left:
            _fail(self._request, type(error).__name__)
        self._end(now)

    # -- decode

    def decode_sent(
        self, id_: str, served: str, prompt_tokens: float, instance: str, url: str, now: float
    ) -> None:
        """Begin the decode leg: ``instance`` gets the request first, and others if it fails."""
        self._end_prefill()
        self._request.set_attribute(names.ID, id_)
        self._request.set_attribute(names.SERVED, served)
        if prompt_tokens:
            self._request.set_attribute(names.INPUT_TOKENS, round(prompt_tokens))
        self._decode = self._client_span("decode", instance, url, 0, now)
        self._attempt_since = now

    @property
    def traceparent(self) -> str:
        """That of the decode leg, for all its attempts: Envoy repeats the headers of the first."""
        return _traceparent(self._decode or self._request)

    def continues(self, decode: str, tokens: int) -> None:
        """Record that the request is for the rest of an answer that ``decode`` has failed."""
        self._request.set_attribute(names.CONTINUES_FROM, decode)
        self._request.set_attribute(names.CONTINUES_AFTER, tokens)

    def decode_failed(self, instance: str, failure: str, status: int, now: float) -> None:
        """Record an attempt at a D that failed (``failure``: the label of that metric)."""
        self._failure, self._status = failure, status
        if self._decode is None or not self._decode.is_recording() or failure in _NO_FAILED_ATTEMPT:
            return
        found: dict[str, _Value] = {names.INSTANCE: instance}
        if status:
            found[names.HTTP_RESPONSE_STATUS_CODE] = status
        if self._failed_attempts:
            found[names.HTTP_REQUEST_RESEND_COUNT] = self._failed_attempts
        context = set_span_in_context(self._decode, Context())
        span = self._tracer.start_span(
            "decode attempt", context, SpanKind.CLIENT, found, start_time=self._at(self._attempt_since)
        )
        _fail(span, failure)
        ended = now if self._ended_at is None else min(now, self._ended_at)
        span.end(self._at(max(ended, self._attempt_since)))
        self._failed_attempts += 1
        self._attempt_since = now

    def answer_ended(self, now: float) -> None:
        """Note when the answer has ended. What became of it Envoy may tell until :meth:`close`."""
        self._ended_at = now

    def result(self, outcome: str, status: int, ttft: float | None) -> None:
        """Note how the request ended, as Envoy tells it, and the seconds to the first byte of the answer."""
        if not self._request.is_recording():
            return
        self._outcome, self._status = outcome, status
        if ttft is not None:
            at = self._at(self._started_at + ttft)
            for span in filter(None, (self._request, self._decode)):
                span.set_attribute(names.TTFT, ttft)
            self._request.add_event("first token", timestamp=at)

    def close(self, now: float, instance: str = "", url: str = "") -> None:
        """End all spans; ``instance`` is the D that has answered, if one has."""
        if not self._request.is_recording():
            return
        outcome = self._outcome or ("ok" if instance else _outcome(self._failure, self._status))
        status = 200 if instance and not self._outcome else self._status
        ended = now if self._ended_at is None else self._ended_at
        reason = self._failure or (str(status) if status >= 400 else outcome)
        self._request.set_attribute(names.OUTCOME, outcome)
        for span in filter(None, (self._request, self._decode)):
            if status:
                span.set_attribute(names.HTTP_RESPONSE_STATUS_CODE, status)
        if self._decode is not None:
            if instance:
                self._decode.set_attributes(self._server(instance, url))
            if self._failed_attempts:
                self._decode.set_attribute(names.HTTP_REQUEST_RESEND_COUNT, self._failed_attempts)
            if outcome not in ("ok", "left"):
                _fail(self._decode, reason)
        if outcome in ("error", "cut"):  # a client's own mistake is no error of a server's span
            _fail(self._request, reason)
        self._end(ended)

    # -- spans

    def _end(self, now: float) -> None:
        self._end_prefill()
        if self._decode is not None:
            self._decode.end(self._at(now))
        self._request.end(self._at(now))

    def _end_prefill(self) -> None:
        if self._prefill is not None and self._prefill_ended_at is not None:
            self._prefill.end(self._at(self._prefill_ended_at))
        self._prefill = self._prefill_ended_at = None

    def _client_span(self, name: str, instance: str, url: str, attempts_before: int, now: float) -> Span:
        found = self._server(instance, url)
        found[names.HTTP_REQUEST_METHOD] = self._method
        if attempts_before:
            found[names.HTTP_REQUEST_RESEND_COUNT] = attempts_before
        return self._span(name, found, now, SpanKind.CLIENT)

    def _server(self, instance: str, url: str) -> dict[str, _Value]:
        parts = urlsplit(url)
        return {
            names.INSTANCE: instance,
            names.URL_FULL: url + self._path,
            names.SERVER_ADDRESS: parts.hostname or "",
            names.SERVER_PORT: parts.port or 80,
        }

    def _span(
        self, name: str, found: Mapping[str, _Value], since: float, kind: SpanKind = SpanKind.INTERNAL
    ) -> Span:
        if not self._request.is_recording():
            return self._request
        return self._tracer.start_span(name, self._context, kind, found, start_time=self._at(since))

    def _at(self, seconds: float) -> int:
        return self._offset + int(seconds * 1e9)


class LegSpan:
    """A request to an instance that runs beside others of the same client's request."""

    __slots__ = ("_at", "_span")

    def __init__(self, span: Span, at: Callable[[float], int]) -> None:
        self._span = span
        self._at = at

    @property
    def traceparent(self) -> str:
        """That of the request to the instance."""
        return _traceparent(self._span)

    def ended(self, now: float, failure: str) -> None:
        """End it; ``failure`` says why it was of no use, and is empty if it was."""
        if failure:
            _fail(self._span, failure)
        self._span.end(self._at(now))


_LEFT = ("left", "abandoned", "broken_off")
"""Failures that are the client's doing."""
_NO_FAILED_ATTEMPT = (*_LEFT, "unsent")
"""What Envoy tells of a request, not of an instance that has failed it."""


def _traceparent(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _fail(span: Span, reason: str) -> None:
    span.set_attribute(names.ERROR_TYPE, reason)
    span.set_status(StatusCode.ERROR, reason)


def _outcome(failure: str, status: int) -> str:
    """Return how a request ended that no D has answered: as in ``pd_scheduler_responses_total``."""
    if failure in ("", *_LEFT) or (failure == "unsent" and status < 400):
        return "left"
    if failure == "cut":
        return "cut"
    return "client_error" if 400 <= status < 500 else "error"
