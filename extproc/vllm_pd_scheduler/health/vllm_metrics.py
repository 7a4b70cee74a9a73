"""vLLM's ``/metrics``: the few series a scheduler needs, under their current and older names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from ..models import InstanceRole, MetricsSnapshot

_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:gpu_cache_usage_perc": "kv_usage",  # before vLLM 0.10
}
_LATENCY = {
    InstanceRole.PREFILL: ("vllm:time_to_first_token_seconds",),
    InstanceRole.DECODE: (
        "vllm:request_time_per_output_token_seconds",
        "vllm:time_per_output_token_seconds",  # its name in older releases
    ),
}
_STEP = (
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",  # before the two were told apart
)
_TRANSFER = ("vllm:nixl_xfer_time_seconds",)
_HISTOGRAMS = {name for names in (*_LATENCY.values(), _STEP, _TRANSFER) for name in names}
_GENERATED = "vllm:generation_tokens_total"
_FINISHED = "vllm:request_success_total"
_CACHE = "vllm:cache_config_info"
_START = "process_start_time_seconds"
_WANTED = {
    _START, _GENERATED, _FINISHED, _CACHE, *_GAUGES,
    *(f"{name}_{part}" for name in _HISTOGRAMS for part in ("sum", "count")),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scrape:
    """One parsed ``/metrics`` page: gauges over all engines, and ``(sum, count)`` of each histogram."""

    running: float
    waiting: float
    kv_usage: float
    histograms: dict[str, tuple[float, float]]
    started_at: float | None = None
    """Start time of the server's process, Unix seconds."""
    kv_capacity: float | None = None
    """Tokens that the KV cache holds, all engines together."""
    generated: float = 0.0
    """Tokens generated since the start."""
    finished: float = 0.0
    """Requests that ended since the start."""


class NotVllmMetrics(ValueError):
    """The page has none of the series that every vLLM server exposes."""


def parse_metrics(page: str) -> Scrape:
    """Parse a Prometheus text page of a vLLM server.

    Requests of several engines (data parallel) are summed, their KV use averaged. Raises
    :exc:`NotVllmMetrics` if the page is of something else or cannot be parsed.
    """
    # A page has some 600 lines, of which we want ten. Parsing them all takes the event loop 9 ms, which
    # every request in between would feel; choosing the lines first, 0.3 ms.
    lines = [line for line in page.splitlines() if line.split("{", 1)[0].split(" ", 1)[0] in _WANTED]
    values: dict[str, list[float]] = {}
    capacity = 0.0
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                if sample.name == _CACHE:
                    capacity += _kv_tokens(sample.labels)
                if math.isfinite(sample.value):  # a NaN would win or lose every comparison
                    values.setdefault(sample.name, []).append(sample.value)
    except ValueError as error:
        raise NotVllmMetrics(f"/metrics cannot be parsed: {error}") from None
    gauges: dict[str, list[float]] = {}
    for name, key in _GAUGES.items():
        if key not in gauges and name in values:
            gauges[key] = values[name]
    if "running" not in gauges and "waiting" not in gauges:
        raise NotVllmMetrics("/metrics has no vllm:num_requests_running: is this a vLLM server?")
    kv_usage = gauges.get("kv_usage", [0.0])
    histograms = {
        name: (sum(values[f"{name}_sum"]), sum(values[f"{name}_count"]))
        for name in _HISTOGRAMS
        if f"{name}_sum" in values and f"{name}_count" in values
    }
    return Scrape(
        sum(gauges.get("running", [])),
        sum(gauges.get("waiting", [])),
        sum(kv_usage) / len(kv_usage),
        histograms,
        values.get(_START, [None])[0],
        capacity or None,
        sum(values.get(_GENERATED, [])),
        sum(values.get(_FINISHED, [])),
    )


def _kv_tokens(labels: dict[str, str]) -> float:
    """Tokens that one engine's KV cache holds; 0 if its labels do not say."""
    try:
        return float(int(labels["block_size"]) * int(labels["num_gpu_blocks"]))
    except (KeyError, ValueError):  # "None" until the engine has measured its memory
        return 0.0


def snapshot(
    scrape: Scrape, before: Scrape | None, last: MetricsSnapshot | None, role: InstanceRole, now: float
) -> MetricsSnapshot:
    """What ``scrape`` says at time ``now``, the latency being that of the requests since ``before``.

    If none ended in between, or the counters went back (a restart), the ``last`` known latency stays
    (a restart: none).
    """
    latency = last.latency if last else None
    seen = _since(scrape, before, _LATENCY[role])
    if seen is not None:
        latency = latency if seen.count == 0 else seen.mean  # counters that went back: a restart
    step, transfer = _since(scrape, before, _STEP), _since(scrape, before, _TRANSFER)
    restarted = before is None or scrape.generated < before.generated or scrape.finished < before.finished
    return MetricsSnapshot(
        now,
        scrape.running,
        scrape.waiting,
        scrape.kv_usage,
        latency,
        scrape.kv_capacity,
        step.mean if step else None,
        0.0 if restarted or before is None else scrape.generated - before.generated,
        0.0 if restarted or before is None else scrape.finished - before.finished,
        transfer.mean if transfer else None,
    )


@dataclass(frozen=True, slots=True)
class _Since:
    """What a histogram counted between two scrapes; a negative count means that it began anew."""

    total: float
    count: float

    @property
    def mean(self) -> float | None:
        return max(0.0, self.total) / self.count if self.count > 0 else None


def _since(scrape: Scrape, before: Scrape | None, names: tuple[str, ...]) -> _Since | None:
    """Return the difference of the first histogram that both scrapes have."""
    for name in names:
        if before is not None and name in scrape.histograms and name in before.histograms:
            total, count = scrape.histograms[name]
            total_before, count_before = before.histograms[name]
            return _Since(total - total_before, count - count_before)
    return None
