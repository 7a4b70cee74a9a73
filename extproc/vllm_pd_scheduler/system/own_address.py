"""The address that this machine has towards another one."""

from __future__ import annotations

import socket


def own_address(towards: str) -> str:
    """Return the IP address from which this machine reaches another one; nothing is sent for that.

    Raise :exc:`OSError` if it cannot be reached.
    """
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])
