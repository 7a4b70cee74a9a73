"""How a request ended that was sent to decode, as Envoy tells it."""

from __future__ import annotations

from typing import NamedTuple

from ..telemetry import Ending


class Result(NamedTuple):
    """The end of one request. All times are seconds from the first byte of it that Envoy has read."""

    request: str
    """Our id of it (``names.ID``)."""
    ending: Ending
    status: int
    """Of the answer that the client got; 0: none."""
    duration: float
    """To the end of the answer."""
    ttft: float | None
    """To the first byte of the answer's body, if there was one."""
    sent: float | None
    """To the last byte that was sent to D, if the last attempt came so far."""
    address: str
    """``ip:port`` of the D that answered; empty if none did."""
    answer_bytes: int = 0
    """Of the answer's body, as sent to the client."""
