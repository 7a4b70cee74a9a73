"""How spans leave the process, and what happens when they cannot."""

import asyncio
import logging
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tests.support.otlp import collecting
from tests.support.processes import unused_ports
from tests.support.tracing import UNSAMPLED
from tests.support.waiting import until
from vllm_pd_scheduler.config import SchedulerConfig, TracingConfig
from vllm_pd_scheduler.service.app import App, StartupError
from vllm_pd_scheduler.tracing import export
from vllm_pd_scheduler.tracing.export import SpanExport

HEADERS = {":method": "POST", ":path": "/v1/completions"}


class Stuck(SpanExporter):
    """Takes spans and does not return."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self.go_on.wait()
        return SpanExportResult.SUCCESS


def trace(exporting: SpanExport, times: int = 1) -> None:
    for _ in range(times):
        begun = exporting.tracer.begin(HEADERS, 1.0)
        assert begun is not None
        begun.rejected(400, "bad_body", 2.0)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What reaches the log: pytest also hears OpenTelemetry's own loggers, which do not."""
    return [each.getMessage() for each in caplog.records if not each.name.startswith("opentelemetry")]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


async def test_the_last_spans_are_sent_at_the_end() -> None:
    async with collecting() as collector:
        exporting = SpanExport(collector.url + "/v1/traces")
        trace(exporting)
        await exporting.close()
        (span,) = collector.spans
    assert (span.name, span.service) == ("POST /v1/completions", "vllm-pd-scheduler")


async def test_a_full_batch_is_sent_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    async with collecting() as collector:
        exporting = SpanExport(collector.url + "/v1/traces")
        trace(exporting, 10)
        await until(lambda: len(collector.spans) == 10)
        await exporting.close()


@pytest.mark.parametrize(
    ("configured", "variable", "found"),
    [("mine", "theirs", "mine"), (None, "theirs", "theirs"), (None, "", "vllm-pd-scheduler")],
)
async def test_the_services_name(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, variable: str, found: str
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", variable)
    async with collecting() as collector:
        exporting = SpanExport(collector.url + "/v1/traces", service_name=configured)
        trace(exporting)
        await exporting.close()
        assert [span.service for span in collector.spans] == [found]


async def test_the_environment_says_what_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with collecting() as collector:
        own, given = SpanExport(collector.url), SpanExport(collector.url, sample_ratio=1.0)
        for exporting, recorded in ((own, False), (given, True)):
            begun = exporting.tracer.begin(HEADERS, 1.0)
            assert begun is not None
            assert begun._request.is_recording() is recorded
            assert exporting.tracer.begin({**HEADERS, "traceparent": UNSAMPLED}, 1.0) is None
            await exporting.close()


async def test_a_disabled_sdk_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    exporting = SpanExport("http://127.0.0.1:9/v1/traces")
    assert exporting.tracer.begin(HEADERS, 1.0) is None
    await exporting.close()


async def test_a_collector_that_hangs_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHUTDOWN_S", 0.05)
    stuck = Stuck()
    exporting = SpanExport("", exporter=stuck)
    trace(exporting, 600)
    await asyncio.to_thread(stuck.entered.wait)
    await exporting.close()
    stuck.go_on.set()


async def test_a_queue_that_is_full_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(export, "SHUTDOWN_S", 0.05)
    stuck = Stuck()
    exporting = SpanExport("", exporter=stuck)
    trace(exporting, 5000)
    stuck.go_on.set()
    await exporting.close()
    (line,) = logged(caplog)
    assert "Queue full" in line


async def test_a_key_for_the_collector_is_never_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "secret-without-a-name")
    await SpanExport("http://127.0.0.1:9/v1/traces").close()
    (line,) = logged(caplog)
    assert "OTEL_EXPORTER_OTLP_HEADERS cannot be read" in line


async def test_what_an_exporter_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            raise OSError("no such certificate")

    exporting = SpanExport("", exporter=Broken())
    trace(exporting)
    await exporting.close()
    (line,) = logged(caplog)
    assert "OSError: no such certificate" in line


async def test_a_variable_that_cannot_be_used_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "5")
    config = SchedulerConfig(tracing=TracingConfig(endpoint="http://127.0.0.1:9"))
    with pytest.raises(StartupError, match="tracing: max_export_batch_size"):
        async with App(config):
            pass


async def test_a_collector_that_is_away_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(export, "SHUTDOWN_S", 0.05)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    exporting = SpanExport(f"http://127.0.0.1:{unused_ports(1)[0]}/v1/traces")
    trace(exporting)
    await until(lambda: logged(caplog))
    await exporting.close()
    (line,) = logged(caplog)
    assert "Connection refused" in line
    assert not logging.getLogger("opentelemetry").propagate
