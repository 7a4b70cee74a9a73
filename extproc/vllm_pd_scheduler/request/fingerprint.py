"""By what the same prompt is known again."""

from __future__ import annotations

from .body import JsonBody

ENDS_BYTES = 32 << 10
"""What is hashed of a prompt at each of its ends: to hash 64 MiB would hold the event loop up for 50 ms. Two
of one length that differ only between the ends are taken for the same. So an innocent one may be refused for
a while, once the other one has ended two instances."""


def fingerprint(body: JsonBody) -> int:
    """Return a number by which the same prompt is known again in this process; 0 if there is none."""
    prompt = body.value(body.api.prompt[-1])
    if prompt is None:
        return 0
    return _of(prompt.text, prompt.start, prompt.end)


def fingerprint_of_all(body: bytes) -> int:
    """Return the same of a body that is not read, and so is known by all that it says; 0 if there is none."""
    return _of(body, 0, len(body)) if body else 0


def _of(text: bytes, start: int, end: int) -> int:
    if end - start <= 2 * ENDS_BYTES:
        return hash(text[start:end]) or 1
    return hash((end - start, text[start : start + ENDS_BYTES], text[end - ENDS_BYTES : end])) or 1
