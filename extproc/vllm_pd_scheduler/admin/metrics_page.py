"""Writes ``/metrics``, in steps: the page of a large fleet takes half a second, in which requests go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

STEP_SAMPLES = 200
"""Lines that are written at a time: a millisecond or two."""

_HEADER_LINES = 2
"""``# HELP`` and ``# TYPE``."""


async def metrics_page(registries: Iterable[CollectorRegistry]) -> bytes:
    """Return the metrics in Prometheus's text format, and let others run between two steps."""
    return await as_one_page(
        part for registry in registries for metric in registry.collect() for part in _parts(metric)
    )


async def as_one_page(parts: Iterable[bytes]) -> bytes:
    """Return parts as one, and let others run between two of them."""
    made: list[bytes] = []
    for part in parts:
        made.append(part)
        await asyncio.sleep(0)
    return b"".join(made)


def _parts(metric: Metric) -> Iterator[bytes]:
    """Yield the lines of a metric, some at a time.

    Without the times at which its series began: they double the lines of a counter, and a restart of the
    scheduler shows in ``process_start_time_seconds``.
    """
    samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    for at in range(0, len(samples) or 1, STEP_SAMPLES):
        part = Metric(metric.name, metric.documentation, metric.type)
        part.samples = samples[at : at + STEP_SAMPLES]
        text = generate_latest(_Collected(part))
        yield text if at == 0 else text.split(b"\n", _HEADER_LINES)[_HEADER_LINES]


class _Collected(CollectorRegistry):
    """A registry of one metric that was collected before."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        """Yield it."""
        yield self._metric
