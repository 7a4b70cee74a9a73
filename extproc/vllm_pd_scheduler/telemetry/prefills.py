"""What becomes of prefills."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter

from .buckets import SECONDS
from .counter import LeanCounter
from .histogram import LeanHistogram
from .kept import keep_only
from .totals import Totals


class Prefills:
    """Times the legs to P, and counts what P has read."""

    def __init__(self, registry: CollectorRegistry, totals: Totals) -> None:
        self._totals = totals
        self._prefill_seconds = LeanHistogram(
            "pd_scheduler_prefill_duration_seconds",
            "Time of the prefill leg, as the scheduler sees it.",
            ["prefill"],
            buckets=SECONDS,
            registry=registry,
        )
        self._predicted = LeanHistogram(
            "pd_scheduler_prefill_predicted_ratio",
            "Predicted over measured time of a prefill, queueing included: 1 is right.",
            ["prefill"],
            # Fine around 1, which is right, and up to ten times too much or too little.
            buckets=(0.1, 0.25, 0.5, 0.8, 0.9, 1.1, 1.25, 2, 4, 10),
            registry=registry,
        )
        self._prefill_failures = Counter(
            "pd_scheduler_prefill_failures",
            "Prefill attempts that gave no hand-off.",
            ["prefill", "reason"],
            registry=registry,
        )
        self._prompt_tokens = LeanCounter(
            "pd_scheduler_prompt_tokens",
            "Tokens of prompts that P has computed or had cached.",
            [],
            registry=registry,
        ).series()
        cached = LeanCounter(
            "pd_scheduler_cached_prompt_tokens",
            "Tokens of prompts in P's cache: as predicted, and as P has said.",
            ["kind"],
            registry=registry,
        )
        self._pulled_tokens = Counter(
            "pd_scheduler_pulled_prompt_tokens",
            "Tokens of prompts that P was told to pull from another instance, which had them cached.",
            ["source", "outcome"],
            registry=registry,
        )
        self._cached = {kind: cached.series(kind) for kind in ("predicted", "actual")}

    def took(self, instance: str, seconds: float) -> None:
        """Record how long a prefill leg took that was answered."""
        self._prefill_seconds.series(instance).observe(seconds)

    def predicted(self, instance: str, ratio: float) -> None:
        """Record predicted over measured time of a prefill."""
        self._predicted.series(instance).observe(ratio)

    def failed(self, instance: str, reason: str) -> None:
        """Count a prefill attempt that returned no hand-off; ``reason`` as in ``docs/metrics.md``."""
        self._prefill_failures.labels(instance, reason).inc()

    def prompt_read(self, tokens: float, predicted: float, actual: float | None) -> None:
        """Count a prompt that P has read, and how many of its tokens were said to be, and were, cached."""
        self._prompt_tokens.inc(tokens)
        self._cached["predicted"].inc(predicted)
        if actual is not None:
            self._cached["actual"].inc(actual)
            self._totals.prompt_tokens += tokens
            self._totals.cached_tokens += actual

    def prefix_pulled(self, source: str, tokens: float, paid: bool) -> None:
        """Count tokens that P was told to pull from another instance, and whether that has paid."""
        self._pulled_tokens.labels(source, "ok" if paid else "in_vain").inc(tokens)

    def keep_only(self, instances: Collection[str]) -> None:
        """Forget the series of all other instances, which were removed."""
        self._prefill_seconds.keep("prefill", frozenset(instances))
        self._predicted.keep("prefill", frozenset(instances))
        keep_only(self._prefill_failures, "prefill", instances)
        keep_only(self._pulled_tokens, "source", instances)
