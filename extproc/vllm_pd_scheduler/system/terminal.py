"""The terminal that a process was started from."""

from __future__ import annotations

import os


def has_terminal() -> bool:
    """Whether the process has a controlling terminal now; one that was closed is none."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
