"""What becomes of images, videos and sounds that encode instances are to encode."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Histogram

from .buckets import SECONDS
from .kept import keep_only


class Encodes:
    """Counts items, and what each encode instance (E) makes of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._encode_seconds = Histogram(
            "pd_scheduler_encode_duration_seconds",
            "Time that an encode instance took for an item, as the scheduler sees it.",
            ["encode"],
            buckets=SECONDS,
            registry=registry,
        )
        self._encode_failures = Counter(
            "pd_scheduler_encode_failures",
            "Attempts to encode an item that handed nothing over.",
            ["encode", "reason"],
            registry=registry,
        )
        self._media_items = Counter(
            "pd_scheduler_media_items",
            "Images, videos and sounds in requests: encoded by an encode instance, or left to the prefill.",
            ["outcome"],
            registry=registry,
        )
        for kind in ("encoded", "left"):
            self._media_items.labels(kind)

    def took(self, instance: str, seconds: float) -> None:
        """Record an item that an encode instance has encoded, and how long it took."""
        self._encode_seconds.labels(instance).observe(seconds)

    def failed(self, instance: str, reason: str) -> None:
        """Count an attempt to encode an item that failed; ``reason`` as in ``docs/metrics.md``."""
        self._encode_failures.labels(instance, reason).inc()

    def items(self, encoded: int, left: int) -> None:
        """Count a request's items: those that were encoded before the prefill, and those that were not."""
        self._media_items.labels("encoded").inc(encoded)
        self._media_items.labels("left").inc(left)

    def keep_only(self, instances: Collection[str]) -> None:
        """Forget the series of all other instances, which were removed."""
        for metric in (self._encode_seconds, self._encode_failures):
            keep_only(metric, "encode", instances)
