"""Tell what this machine lacks from what an instance does."""

from __future__ import annotations

import errno

_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Not EADDRNOTAVAIL: it also tells of an IPv6 address on a machine that has none."""


def is_our_shortage(error: BaseException) -> bool:
    """Whether a request failed for want of file descriptors, buffers or memory of our own.

    Then it says nothing of the instance.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OURS)
