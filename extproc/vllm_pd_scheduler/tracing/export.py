"""Sends spans to a collector, off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from importlib.metadata import PackageNotFoundError, version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased

from ..system.daemon_thread import in_daemon_thread
from ..telemetry.pace import Pace
from .request_tracer import RequestTracer

log = logging.getLogger(__name__)

SHUTDOWN_S = 2.0
"""How long the last spans may take at the end of the process. Those of a collector that is away are lost."""

_NAME = "vllm-pd-scheduler"
_MAX_TEXT = 500
_READS_HEADERS = "opentelemetry.util.re"
"""Who logs ``OTEL_EXPORTER_OTLP_HEADERS`` as it is if it cannot be read, keys and all."""
_BAD_HEADERS = (
    "OTEL_EXPORTER_OTLP_HEADERS cannot be read: it must be NAME=VALUE, URL-encoded, comma-separated"
)
_UNNAMED = "unknown_service"
"""How OpenTelemetry names a service of which the environment says nothing."""


class SpanExport:
    """Sends what ``tracer`` records to the OTLP collector at ``url``, by HTTP, until :meth:`close`.

    A thread sends the spans in batches. They wait in a queue of limited length: when a collector is away, the
    oldest are dropped, and that is logged at most once a minute. What is ``None`` here the environment says
    (``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME``), or OpenTelemetry's default. Raises :exc:`ValueError` if
    the environment has what cannot be used.
    """

    def __init__(
        self,
        url: str,
        sample_ratio: float | None = None,
        service_name: str | None = None,
        exporter: SpanExporter | None = None,
    ) -> None:
        _SdkLog().attach()
        sampler: Sampler | None = None
        if sample_ratio is not None:
            sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._provider = TracerProvider(sampler, _resource(service_name), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(url)))
        self.tracer = RequestTracer(self._provider.get_tracer(_NAME, _version()))

    async def close(self) -> None:
        """Send the spans that are left, for at most ``SHUTDOWN_S``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_S):
                await in_daemon_thread(self._provider.shutdown)


class _SdkLog(logging.Handler):
    """Passes on what OpenTelemetry logs, which it may do for each batch and each span that is dropped.

    What comes from one place is logged at most once a minute.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._pace = Pace(time.monotonic)

    def attach(self) -> None:
        """Take all that it logs from now on, in place of one that did before."""
        root = logging.getLogger("opentelemetry")
        root.handlers[:] = [each for each in root.handlers if not isinstance(each, _SdkLog)]
        root.addHandler(self)
        root.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record of another thread's, or of this one."""
        if self._pace.due((record.name, record.msg)):
            text = _BAD_HEADERS if record.name == _READS_HEADERS else record.getMessage()
            if record.exc_info and (error := record.exc_info[1]) is not None:
                text = f"{text} {type(error).__name__}: {error}"
            log.warning("OpenTelemetry: %s (logged at most once a minute)", text[:_MAX_TEXT])


def _resource(service_name: str | None) -> Resource:
    found = Resource.create({SERVICE_VERSION: _version()})
    if service_name is None and str(found.attributes[SERVICE_NAME]).startswith(_UNNAMED):
        service_name = _NAME
    return found if service_name is None else found.merge(Resource({SERVICE_NAME: service_name}))


def _version() -> str:
    try:
        return version(_NAME)
    except PackageNotFoundError:  # run from a directory on PYTHONPATH
        return ""
