"""Spans in memory, for tests of what is traced."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import StatusCode

from vllm_pd_scheduler.tracing.request_tracer import RequestTracer

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{SPAN}-01"
UNSAMPLED = f"00-{TRACE}-{SPAN}-00"


class Recorder:
    """Records spans; ``tracer`` goes into a router."""

    def __init__(self, ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = RequestTracer(provider.get_tracer("test"))

    @property
    def spans(self) -> list[ReadableSpan]:
        """Those that have ended, by their start."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: (span.start_time, span.end_time))

    @property
    def names(self) -> list[str]:
        return sorted(span.name for span in self.spans)

    def all(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.all(name)
        return span

    @property
    def request(self) -> ReadableSpan:
        """The request's own span."""
        ids = {span.context.span_id for span in self.spans}
        (root,) = [span for span in self.spans if span.parent is None or span.parent.span_id not in ids]
        return root

    @property
    def text(self) -> str:
        """All that is sent."""
        return "".join(span.to_json() for span in self.spans)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """A span's attributes, ours without their prefix."""
    return {name.removeprefix("pd_scheduler."): value for name, value in (span.attributes or {}).items()}


def failed(span: ReadableSpan) -> bool:
    return span.status.status_code is StatusCode.ERROR


def traceparent(span: ReadableSpan) -> str:
    context = span.context
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
