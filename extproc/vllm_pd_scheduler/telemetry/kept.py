"""Forgets series of what is there no more: else they would add up for ever."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import Counter, Histogram


def keep_only(metric: Counter | Histogram, label: str, values: Collection[str]) -> None:
    """Forget the series of a metric in which a label has any other value."""
    seen = {sample.labels[label] for family in metric.collect() for sample in family.samples}
    for gone in seen.difference(values):
        metric.remove_by_labels({label: gone})
