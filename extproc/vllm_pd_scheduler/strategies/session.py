"""The same endpoint for the requests of one session."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy, StrategySettings, all_requests

_POINTS = 100
"""Points that each endpoint has on the ring: shares then differ by about a tenth."""


class Session(Strategy):
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2018).

    A session (see :attr:`RequestContext.session`) is a point on a ring on which each endpoint has a hundred;
    it belongs to the next one. An endpoint that has ceil(1.25 * mean) requests or more is passed over, so
    that one busy session, or a fleet of a few, overloads nobody. When endpoints come and go only their own
    share of the sessions moves. A request without a session goes where the fewest requests are.
    """

    bound: float | None = 1.25
    """Requests that an endpoint may have, as a multiple of the mean; ``None``: any number."""

    def __init__(self, config: StrategySettings) -> None:
        super().__init__(config)
        self._endpoints: Sequence[Endpoint] = ()
        self._members: dict[str, Endpoint] = {}
        self._on_ring: set[str] = set()
        self._ring: list[tuple[int, str]] = []

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Walk the ring from the session's point; those at their bound come last."""
        if request.session is None:
            return super().rank(endpoints, request, count)
        if endpoints is not self._endpoints:
            self._place(endpoints)
        bound = math.inf
        if self.bound is not None:
            bound = math.ceil(self.bound * (sum(all_requests(endpoints)) + 1) / len(endpoints))
        chosen: list[Endpoint] = []
        full: list[Endpoint] = []
        for endpoint in self._walk(_hash(request.session)):
            (chosen if endpoint.requests < bound else full).append(endpoint)
            if len(chosen) == count:
                break
        return [*chosen, *full][:count]

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Fewest requests, for a request without a session."""
        return endpoint.requests

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[float]:
        """Return the score of each."""
        return all_requests(endpoints)

    def _place(self, endpoints: Sequence[Endpoint]) -> None:
        """Put those on the ring that are not there; those that may not be chosen now stay for a while.

        1,000 endpoints take a tenth of a second to hash, and any of them can be saturated in one pick only.
        """
        self._endpoints, self._members = endpoints, {e.id: e for e in endpoints}
        if new := self._members.keys() - self._on_ring:
            if len(self._on_ring) > 2 * len(self._members):
                self._on_ring &= self._members.keys()
                self._ring = [point for point in self._ring if point[1] in self._on_ring]
            self._on_ring |= new
            self._ring += [(point, name) for name in new for point in _points(name)]
            self._ring.sort()

    def _walk(self, point: int) -> Iterator[Endpoint]:
        start = bisect.bisect_left(self._ring, (point, ""))
        left = dict(self._members)
        for at in range(start, start + len(self._ring)):
            endpoint = left.pop(self._ring[at % len(self._ring)][1], None)
            if endpoint is not None:
                yield endpoint
                if not left:
                    return


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _points(name: str) -> list[int]:
    return [_hash(f"{name}#{number}") for number in range(_POINTS)]
