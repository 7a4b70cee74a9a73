"""Tell what this machine lacks from what an instance does."""

from __future__ import annotations

import errno

_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


def is_our_shortage(error: BaseException) -> bool:
    """Whether a request failed for want of file descriptors, buffers, memory or ports of our own.

    Then it says nothing of the instance.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OURS)
