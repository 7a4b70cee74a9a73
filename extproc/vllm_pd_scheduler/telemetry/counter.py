"""A counter that costs a request a tenth of a microsecond; the library's takes ten times as long."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily

from .lean import Lean


class Count:
    """What was counted with the same values of the labels. For one thread: that of the event loop."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Count so much more."""
        self.value += amount


class LeanCounter(Lean[Count]):
    """A Prometheus counter."""

    def _new(self) -> Count:
        return Count()

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Yield what it is, without values."""
        yield CounterMetricFamily(self._name, self._documentation, labels=self._labelnames)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield all series."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labelnames)
        for values, count in self._series.items():
            family.add_metric(values, count.value)
        yield family
