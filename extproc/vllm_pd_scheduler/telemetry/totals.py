"""What the dashboard and the advice show of all instances together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from .histogram import Series

_FINE_SECONDS = tuple(0.001 * 1.1**step for step in range(140))
"""Bounds between which percentiles are right within a few percent, up to ten minutes."""


@dataclass(slots=True)
class Totals:
    """Sums over all instances since the start: read in a moment, however many instances there are."""

    requests: int = 0
    """Requests sent to a decode instance or answered with an error."""
    errors: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Errors that clients got: reasons of the scheduler's own, and how D's answers ended."""
    ttft: Series = field(default_factory=lambda: Series(_FINE_SECONDS))
    """Time to first token."""
    prompt_tokens: float = 0.0
    """Tokens of the prompts of which P has said how many it had cached."""
    cached_tokens: float = 0.0
    """Those that it had."""
