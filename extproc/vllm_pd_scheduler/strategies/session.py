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


class Session(Strategy):
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, SODA 2018).

    - A session (see :attr:`RequestContext.session`) is hashed to a point on a ring, on which each endpoint
      has ``_POINTS_PER_ENDPOINT`` points. It belongs to the endpoint of the next point.
    - An endpoint with at least ceil(``bound`` * mean) requests is passed over, so that a few busy sessions
      do not overload it.
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
        self._members: dict[str, Endpoint] = {}
        self._on_ring: set[str] = set()
        self._ring: list[tuple[int, str]] = []

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Walk the ring from the session's point on; endpoints at their bound come last."""
        if request.session is None:
            return super().rank(endpoints, request, count)
        if endpoints is not self._endpoints:
            self._update_ring(endpoints)
        bound = math.inf
        if self.bound is not None:
            bound = math.ceil(self.bound * (sum(request_counts(endpoints)) + 1) / len(endpoints))
        chosen: list[Endpoint] = []
        full: list[Endpoint] = []
        for endpoint in self._walk(_hash(request.session)):
            (chosen if endpoint.requests < bound else full).append(endpoint)
            if len(chosen) == count:
                break
        return [*chosen, *full][:count]

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the requests there, to rank for a request without a session."""
        return endpoint.requests

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[float]:
        """Return the score of each."""
        return request_counts(endpoints)

    def _update_ring(self, endpoints: Sequence[Endpoint]) -> None:
        """Add endpoints that are not on the ring yet.

        Those that may not be chosen now (saturated, excluded by a retry, down) stay on it and are skipped:
        they are mostly back for the next pick, and to hash 1,000 endpoints takes a tenth of a second. They
        are removed when they are more than half of the ring.
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
        """Yield each endpoint that may be chosen once, in the order of the ring from ``point`` on."""
        start = bisect.bisect_left(self._ring, (point, ""))
        remaining = dict(self._members)
        for at in range(start, start + len(self._ring)):
            endpoint = remaining.pop(self._ring[at % len(self._ring)][1], None)
            if endpoint is not None:
                yield endpoint
                if not remaining:
                    return


def _hash(text: str) -> int:
    # Not Python's hash(), which differs from process to process: after a restart sessions would move.
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _points(name: str) -> list[int]:
    return [_hash(f"{name}#{number}") for number in range(_POINTS_PER_ENDPOINT)]
