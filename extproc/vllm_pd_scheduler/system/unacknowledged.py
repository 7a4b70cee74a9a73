"""What TCP knows of bytes that were sent, or have come."""

from __future__ import annotations

import fcntl
import struct
import sys
import termios


def unacknowledged(descriptor: int) -> int:
    """Return how many bytes sent on a TCP connection the peer's machine has not confirmed to have.

    0 where the operating system does not say.
    """
    return _queued(descriptor, termios.TIOCOUTQ) if sys.platform == "linux" else 0


def unread(descriptor: int) -> int:
    """Return how many bytes have come on a connection that nobody has read; 0 if it has ended."""
    return _queued(descriptor, termios.FIONREAD)


def _queued(descriptor: int, which: int) -> int:
    try:
        answer = fcntl.ioctl(descriptor, which, b"\0\0\0\0")
    except OSError:
        return 0
    return int(struct.unpack("i", answer)[0])
