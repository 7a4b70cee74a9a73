"""The same endpoint for the requests of one session."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from ..endpoint import Endpoint
from ..models import RequestContext
from .base import Strategy

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
    _endpoints: Sequence[Endpoint] = ()
    _ring: Sequence[tuple[int, int]] = ()

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Walk the ring from the session's point; those at their bound come last."""
        if request.session is None:
            return super().rank(endpoints, request, count)
        if endpoints is not self._endpoints:
            self._endpoints = endpoints
            self._ring = sorted((p, i) for i, e in enumerate(endpoints) for p in _points(e.id))
        mean = (sum(e.requests for e in endpoints) + 1) / len(endpoints)
        bound = math.inf if self.bound is None else math.ceil(self.bound * mean)
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

    def _walk(self, point: int) -> Iterator[Endpoint]:
        start = bisect.bisect_left(self._ring, (point, 0))
        seen: set[int] = set()
        for at in range(len(self._ring)):
            index = self._ring[(start + at) % len(self._ring)][1]
            if index not in seen:
                seen.add(index)
                yield self._endpoints[index]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _points(name: str) -> list[int]:
    return [_hash(f"{name}#{number}") for number in range(_POINTS)]
