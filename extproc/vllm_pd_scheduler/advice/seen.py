"""The traffic that one scheduler has seen: of several workers, each has its own."""

from __future__ import annotations

from msgspec import Struct

from ..records.traffic import Recorded
from ..router import PDRouter

MOST_LEAD_S = 120.0
"""Seconds before a time of which requests are told too: those whose answers ran on then."""


class Seen(Struct):
    """Requests since some time, and what was counted since the start."""

    requests: list[Recorded]
    """In the order of their arrival. Their times are those of the machine's monotonic clock."""
    ended: int
    """Requests whose answers have ended well."""
    prompt_tokens: float
    """Of the prompts that P have read,"""
    cached_tokens: float
    """and those of them that P had cached."""

    def ended_since(self, time: float) -> int:
        """Return how many answers have ended since the first request that arrived at a time or later."""
        first = next((each for each in self.requests if each.arrived >= time), None)
        return 0 if first is None else self.ended - first.ended


def seen_by(router: PDRouter, since: float) -> Seen:
    """Return what a scheduler has seen since a time, and shortly before."""
    totals, recording = router.telemetry.totals, router.recording
    requests = recording.traffic.since(since - MOST_LEAD_S)
    return Seen(requests, recording.ended, float(totals.prompt_tokens), float(totals.cached_tokens))
