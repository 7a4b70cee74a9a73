"""What the C library's allocator should do with the memory of large request bodies."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE = 128 << 10
"""glibc's own first threshold, which it raises up to 32 MiB when large blocks come and go."""


def return_large_blocks() -> None:
    """Have freed blocks of 128 KiB and more go back to the system at once.

    Without it a flood of large bodies leaves the process as large as it was then. Does nothing where there
    is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
