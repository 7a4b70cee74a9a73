"""Metrics that cost a request next to nothing: whoever counts keeps the series, and takes no lock."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

S = TypeVar("S")


class Lean(Collector, Generic[S]):
    """A Prometheus metric. ``series`` is to be called once for each set of values, and its result kept."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labelnames = tuple(labels)
        self._series: dict[tuple[str, ...], S] = {}
        registry.register(self)

    @abstractmethod
    def _new(self) -> S:
        """Return a series without observations."""

    @abstractmethod
    def collect(self) -> Iterator[Metric]:
        """Yield all series."""

    def series(self, *values: str) -> S:
        """Return the series with these values of the labels."""
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = self._new()
        return found

    def has(self, *values: str) -> bool:
        """Whether there is a series with these values of the labels."""
        return values in self._series

    def __len__(self) -> int:
        return len(self._series)

    def keep(self, label: str, values: frozenset[str]) -> None:
        """Forget the series in which a label has any other value."""
        at = self._labelnames.index(label)
        self._series = {key: each for key, each in self._series.items() if key[at] in values}
