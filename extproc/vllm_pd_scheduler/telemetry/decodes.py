"""What goes wrong, or another way, with requests at decode instances."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter

from .handoffs import MAX_PAIRS, OTHER
from .histogram import LeanHistogram
from .kept import keep_only
from .outcomes import Stray

_ANSWER_TOKENS = (0, 1, 10, 50, 100, 500, 1000, 5000, 10_000, 50_000)


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
        self._went_on = LeanHistogram(
            "pd_scheduler_continued_after_tokens",
            "Tokens of a stream with x-pd-continue that its client had when another D went on with it.",
            ["failed", "decode"],
            buckets=_ANSWER_TOKENS,
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

    def stream_broke_off(self, outcome: str, failed: str, decode: str | None, tokens: int) -> None:
        """Count a stream that broke off at its D after so many tokens; ``decode`` has written the rest."""
        self._streams_broken_off.labels(outcome).inc()
        if decode is not None:
            pairs = self._went_on
            if len(pairs) >= MAX_PAIRS and not pairs.has(failed, decode):
                failed = decode = OTHER
            pairs.series(failed, decode).observe(tokens)

    def metaserver_called(self, outcome: str) -> None:
        """Count a call by which somebody has asked for a prefill."""
        self._metaserver_calls.labels(outcome).inc()

    def strayed(self, what: Stray) -> None:
        """Count what came here of a request that is not of this run."""
        self._strays[what].inc()

    def keep_only(self, instances: Collection[str]) -> None:
        """Forget the series of all other instances, which were removed."""
        keep_only(self._attempts, "decode", instances)
        for label in ("failed", "decode"):
            self._went_on.keep(label, frozenset((*instances, OTHER)))
