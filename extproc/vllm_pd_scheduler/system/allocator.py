"""Tunes glibc's allocator, so that the memory of large request bodies goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
"""Parameter of ``mallopt(3)``, from ``malloc.h``."""
_THRESHOLD_BYTES = 128 << 10
"""glibc's own first threshold. Unless it is set, glibc raises it up to 32 MiB as large blocks are freed."""


def return_large_blocks() -> None:
    """Make ``free`` return blocks of 128 KiB and more to the system at once.

    Without it, the process stays as large as it was in a flood of large bodies. It does nothing where there
    is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
