"""Instances that deny having a model that they are known to list: an adapter may just have been unloaded."""

from __future__ import annotations

from collections.abc import Callable

from ..fleet.endpoint import Endpoint

STALE_S = 3.0
"""Seconds in which an instance's list is read again, also on a busy machine, once it has denied a model."""

FORGET_S = 60.0
"""Seconds without a denial after which the next one is a first one again."""


class Denials:
    """Says which 404 are an instance's fault. ``read_again`` has the lists of models read, and does not wait.

    What an instance listed when it was last asked, it may have unloaded since. So the first denial has the
    lists read again, and those that come before that are nobody's fault. One that goes on to list what it
    denies does worse than its peers.
    """

    def __init__(self, read_again: Callable[[], None]) -> None:
        self._read_again = read_again
        self._first: dict[Endpoint, tuple[float, float]] = {}
        """When each has denied a model first, and last."""

    def count(self, endpoint: Endpoint, now: float) -> bool:
        """Note a denial; return whether it counts against the endpoint."""
        if endpoint.models is None:
            return True
        first, last = self._first.get(endpoint, (now, now))
        if now - last > FORGET_S:
            first = now
        if first == now:
            self._first = {e: t for e, t in self._first.items() if now - t[1] <= FORGET_S}
        self._first[endpoint] = (first, now)
        if now - first > STALE_S:
            return True
        self._read_again()
        return False
