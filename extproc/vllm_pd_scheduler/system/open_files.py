"""How many files and connections this process may have open."""

from __future__ import annotations

import contextlib
import resource

_ENOUGH = 1 << 20
"""What Linux lets a process have at most unless told otherwise; the limit itself may be 'any number'."""


def raise_open_files_limit() -> int:
    """Raise the limit as far as this process may; return it. A child, such as Envoy, has the same.

    The usual soft limit, 1,024, is there for programs that call ``select``; each request takes a few
    connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
