"""Begins the trace of each request, where its client or the sampler wants one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Tracer, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from . import attributes as names
from .current import current
from .request_trace import RequestTrace

_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_OPERATIONS: Final = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/inference/v1/generate": "text_completion",
}
_W3C = TraceContextTextMapPropagator()


class RequestTracer:
    """Begins traces of requests with ``tracer``. ``wall`` returns nanoseconds since 1970."""

    def __init__(self, tracer: Tracer, wall: Callable[[], int] = time.time_ns) -> None:
        self._tracer = tracer
        self._wall = wall

    def begin(self, headers: Mapping[str, str], now: float) -> RequestTrace | None:
        """Return the trace of a request that has just come, and make it the running task's.

        It is ``None`` if the client has a trace that is not sampled: what the client sent then goes on as it
        is. ``headers`` has lower-case names, and ``now`` is in monotonic seconds.
        """
        context = _W3C.extract(headers, Context()) if "traceparent" in headers else Context()
        method = headers.get(":method", "")
        method = method if method in _METHODS else "_OTHER"
        path = names.text(headers.get(":path", "/").partition("?")[0])
        operation = _OPERATIONS.get(path)
        name = "HTTP" if method == "_OTHER" else method
        wall = self._wall()
        offset = wall - int(now * 1e9)
        span = self._tracer.start_span(
            name if operation is None else f"{name} {path}",
            context,
            SpanKind.SERVER,
            start_time=wall,
        )
        trace = None
        if span.is_recording():
            span.set_attribute(names.HTTP_REQUEST_METHOD, method)
            span.set_attribute(names.URL_PATH, path)
            if operation is not None:
                span.set_attribute(names.HTTP_ROUTE, path)
                span.set_attribute(names.OPERATION, operation)
            if request_id := headers.get("x-request-id"):
                span.set_attribute(names.REQUEST_ID, names.text(request_id))
            trace = RequestTrace(self._tracer, span, method, path, now, offset)
        elif span.get_span_context().is_valid and not get_current_span(context).get_span_context().is_valid:
            trace = RequestTrace(self._tracer, span, method, path, now, offset)
        current.set(trace)
        return trace
