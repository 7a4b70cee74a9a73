"""The endpoints of a pool without those that are left out for a while, kept up to date change by change."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Sequence

from ..fleet.endpoint import Endpoint

_FEW = 32
"""Endpoints up to which nothing here is faster than to go over all of them."""


class Members(tuple[Endpoint, ...]):
    """Those of ``pool`` that are not in ``out``. To ask for one is quick, though no set is made of them."""

    pool: Container[object]
    out: Container[object]

    @classmethod
    def of(
        cls, endpoints: Sequence[Endpoint], pool: Container[object], out: Container[object]
    ) -> tuple[Endpoint, ...]:
        """Return ``endpoints``, which are just these, as long as neither ``pool`` nor ``out`` changes."""
        if len(endpoints) <= _FEW:
            return tuple(endpoints)
        made = cls(endpoints)
        made.pool, made.out = pool, out
        return made

    def __contains__(self, endpoint: object) -> bool:
        return endpoint in self.pool and endpoint not in self.out


class Remaining:
    """Those of ``endpoints`` that are not left out, in the same order.

    To go over 1,000 endpoints for each pick would take longer than the rest of the pick.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._places = {endpoint: place for place, endpoint in enumerate(endpoints)}
        self.all = Members.of(endpoints, self._places, ())
        """All of them, left out or not."""
        self._list = list(endpoints)
        self._out: Container[object] = ()
        self._members: tuple[Endpoint, ...] | None = None
        """What ``_list`` has, if it was asked for since that has changed."""

    def leave_out(self, out: Container[object], moved: Iterable[Endpoint] | None) -> None:
        """Leave out those in ``out``.

        Only those in ``moved`` may have come into it or left it since the call before; ``None``: any may.
        """
        self._members, self._out = None, out
        if moved is None or len(self.all) <= _FEW:
            self._list = [e for e in self.all if e not in out]
            return
        place_of = self._places.__getitem__
        for endpoint in moved:
            if endpoint in self._places:
                at = bisect_left(self._list, place_of(endpoint), key=place_of)
                there = at < len(self._list) and self._list[at] is endpoint
                if endpoint not in out:
                    self._list[at : at + there] = [endpoint]
                elif there:
                    del self._list[at]

    def get(self) -> tuple[Endpoint, ...]:
        """Return those that remain. They are to be used at once."""
        if self._members is None:
            # A tuple, since strategies get it: one that sorted a list in place would spoil it for all.
            self._members = Members.of(self._list, self._places, self._out)
        return self._members
