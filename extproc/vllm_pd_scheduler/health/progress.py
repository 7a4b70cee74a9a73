"""Whether an engine gets on with its requests: its server may answer while the engine hangs."""

from __future__ import annotations

from .vllm_metrics import Scrape

STALLED_S = 30.0
"""Seconds without a step, while requests run, after which an engine hangs. A step takes milliseconds, or a
second where it reads a piece of a long prompt."""


class Progress:
    """Watch the counters of one engine that move with each step, from scrape to scrape."""

    def __init__(self) -> None:
        self._counters: tuple[float, float, float] | None = None
        self._moved_at = 0.0

    def seen(self, scrape: Scrape, now: float) -> float:
        """Return for how many seconds requests have been running without a step."""
        counters = scrape.generated, scrape.finished, scrape.steps
        if counters != self._counters or scrape.running == 0.0:
            self._counters, self._moved_at = counters, now
        return now - self._moved_at
