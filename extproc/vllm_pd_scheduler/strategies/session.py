"""``session``: the same endpoint for all requests of one session."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy, StrategySettings, request_counts

_POINTS_PER_ENDPOINT = 100
"""Points that each endpoint has on the ring.

With k points its share of the sessions deviates by about 1/sqrt(k), here a tenth; more points take more time
to hash and sort when endpoints come and go.
"""

_MAX_COUNTED = 64
"""Endpoints up to which the mean number of requests is that of all; else of so many drawn at random.

By this very rule no endpoint has many more requests than the mean. So the mean of 64 is mostly within 6 % of
that of all, and to count all would take longer than all else.
"""


class Session(Strategy):
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, SODA 2018).

    - A session (see :attr:`RequestContext.session`) is hashed to a point on a ring, on which each endpoint
      has ``_POINTS_PER_ENDPOINT`` points. It belongs to the endpoint of the next point.
    - An endpoint with at least ceil(``bound`` * mean) requests is passed over, so that a few busy sessions
      do not overload it. The mean of a large fleet is that of ``_MAX_COUNTED`` endpoints drawn at random.
    - When an endpoint comes or goes, only its own share of the sessions moves.
    - A request without a session goes to the endpoint with the fewest requests.
    """

    bound: float | None = 1.25
    """Requests that an endpoint may have, as a multiple of the mean; ``None`` for any number.

    A choice: less moves sessions away from their cache more often, more tolerates more uneven load.
    """

    def __init__(self, config: StrategySettings) -> None:
        super().__init__(config)
        self._endpoints: Sequence[Endpoint] = ()
        """Those for which the ring was last looked at."""
        self._on_ring: set[Endpoint] = set()
        self._points: list[int] = []
        """The ring: sorted."""
        self._owners: dict[int, Endpoint] = {}
        """The endpoint of each point."""

    def accepts_sample(self, request: RequestContext) -> bool:
        """Return whether the request has no session, so that any endpoint with few requests will do."""
        return request.session is None

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Walk the ring from the session's point on; endpoints at their bound come last."""
        if request.session is None:
            return super().rank(endpoints, request, count)
        if endpoints is not self._endpoints:
            self._update_ring(endpoints)
        bound = self._bound(endpoints)
        chosen: list[Endpoint] = []
        full: list[Endpoint] = []
        for endpoint in self._walk(_hash(request.session), endpoints):
            (chosen if endpoint.requests < bound else full).append(endpoint)
            if len(chosen) == count:
                break
        return [*chosen, *full][:count]

    def _bound(self, endpoints: Sequence[Endpoint]) -> float:
        if self.bound is None:
            return math.inf
        counted = endpoints
        if len(endpoints) > _MAX_COUNTED:
            counted = self.random.choices(endpoints, k=_MAX_COUNTED)
        requests = sum(request_counts(counted)) * (len(endpoints) / len(counted))
        return math.ceil(self.bound * (requests + 1) / len(endpoints))

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the requests there, to rank for a request without a session."""
        return endpoint.requests

    def terms(self, endpoint: Endpoint, request: RequestContext) -> dict[str, float]:
        """Return the requests there."""
        return {"requests": endpoint.requests}

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[float]:
        """Return the score of each."""
        return request_counts(endpoints)

    def _update_ring(self, endpoints: Sequence[Endpoint]) -> None:
        """Add endpoints that are not on the ring yet.

        Those that may not be chosen now (saturated, excluded by a retry, down) stay on it and are skipped:
        they are mostly back for the next pick, and to hash 1,000 endpoints takes a tenth of a second. They
        are removed when they are more than half of the ring.
        """
        self._endpoints = endpoints
        if self._on_ring.issuperset(endpoints):
            return
        new = set(endpoints) - self._on_ring
        if len(self._on_ring) > 2 * len(endpoints):
            self._on_ring &= set(endpoints)
            self._owners = {p: owner for p, owner in self._owners.items() if owner in self._on_ring}
            self._points = [point for point in self._points if point in self._owners]
        self._on_ring |= new
        added = {point: endpoint for endpoint in new for point in _points(endpoint.id)}
        self._points += added.keys() - self._owners.keys()
        self._points.sort()
        self._owners |= added

    def _walk(self, point: int, endpoints: Sequence[Endpoint]) -> Iterator[Endpoint]:
        """Yield each of ``endpoints`` once, in the order of the ring from ``point`` on."""
        start = bisect.bisect_left(self._points, point)
        seen: set[Endpoint] = set()
        for at in range(start - len(self._points), start):  # an index below 0 counts from the end
            endpoint = self._owners[self._points[at]]
            if endpoint not in seen and endpoint in endpoints:
                yield endpoint
                seen.add(endpoint)
                if len(seen) == len(endpoints):
                    return


def _hash(text: str) -> int:
    # Not Python's hash(), which differs from process to process: after a restart sessions would move.
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _points(name: str) -> list[int]:
    return [_hash(f"{name}#{number}") for number in range(_POINTS_PER_ENDPOINT)]
