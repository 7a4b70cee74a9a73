"""By what the same prompt is known again."""

from __future__ import annotations

from .body import JsonBody

MAX_BYTES = 1 << 20
"""Larger prompts have no fingerprint: to hash one of 64 MiB would hold the event loop up for 50 ms."""


def fingerprint(body: JsonBody) -> int:
    """Return a number by which the same prompt is known again in this process; 0 if it is too large."""
    prompt = body.value("messages") or body.value("prompt")
    if prompt is None or prompt.size > MAX_BYTES:
        return 0
    return hash(prompt.text[prompt.start : prompt.end]) or 1
