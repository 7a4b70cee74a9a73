"""What goes wrong, or another way, with requests at decode instances."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter

from .kept import keep_only
from .outcomes import Stray


class Decodes:
    """Counts attempts that failed, streams that broke off, prefills that D asked for, and strays."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._attempts = Counter(
            "pd_scheduler_decode_attempt_failures",
            "Attempts at a decode instance that failed; 'cut' is a stream that a client lost.",
            ["decode", "failure"],
            registry=registry,
        )
        self._streams_broken_off = Counter(
            "pd_scheduler_streams_continued",
            "Streams with x-pd-continue that broke off at their D, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        self._metaserver_calls = Counter(
            "pd_scheduler_metaserver_calls",
            "Calls by which decode instances have asked for prefills.",
            ["outcome"],
            registry=registry,
        )
        strays = Counter(
            "pd_scheduler_strays",
            "What Envoy has told or asked of requests that another scheduler has, or had before a restart.",
            ["what"],
            registry=registry,
        )
        self._strays = {what: strays.labels(what) for what in Stray}

    def attempt_failed(self, instance: str, failure: str) -> None:
        """Count an attempt at a decode instance that failed; ``failure`` as in ``docs/metrics.md``."""
        self._attempts.labels(instance, failure).inc()

    def stream_broke_off(self, outcome: str) -> None:
        """Count a stream that broke off at its D."""
        self._streams_broken_off.labels(outcome).inc()

    def metaserver_called(self, outcome: str) -> None:
        """Count a call by which somebody has asked for a prefill."""
        self._metaserver_calls.labels(outcome).inc()

    def strayed(self, what: Stray) -> None:
        """Count what came here of a request that is not of this run."""
        self._strays[what].inc()

    def keep_only(self, instances: Collection[str]) -> None:
        """Forget the series of all other instances, which were removed."""
        keep_only(self._attempts, "decode", instances)
