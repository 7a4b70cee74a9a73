"""Who of a role can serve now, and who cannot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .breaker import BreakerState
from .condition import EJECTED, shown_state
from .endpoint import Endpoint


class _Standing(NamedTuple):
    """What counts of an endpoint."""

    out: str | None
    """Its state, if it is not routable."""
    breaker: BreakerState
    draining: bool
    drained: bool


class Lineup:
    """The endpoints of one role, in the order in which they were added. Part of the registry.

    Endpoints tell nothing by themselves: who changes one has it looked at, and then all lined up.
    """

    def __init__(self) -> None:
        self.routable: tuple[Endpoint, ...] = ()
        self.ejected: tuple[Endpoint, ...] = ()
        self.out_of_service: tuple[tuple[Endpoint, str], ...] = ()
        """Those that are not routable, with their states; a new tuple after each change."""
        self.draining: tuple[Endpoint, ...] = ()
        self.trials = False
        """Whether one was ejected and may be on trial."""
        self._standings: dict[Endpoint, _Standing] = {}

    def look_at_all(self, endpoints: Iterable[Endpoint]) -> None:
        """Take it that these are there, as they are now."""
        self._standings = {each: _standing(each) for each in endpoints}
        if self._none_is_left():
            for each in self._standings:  # one that fails now and then is better than none
                each.breaker.readmit()
            self._standings = {each: _standing(each) for each in self._standings}

    def look_at(self, ranks: Iterable[Endpoint], *, there: bool) -> bool:
        """Take it that these are there, or are not any more; all others are as they were.

        Return ``False`` if the others are not to stay so, as nobody can serve: look at all, then.
        """
        for each in ranks:
            if there:
                self._standings[each] = _standing(each)
            else:
                self._standings.pop(each, None)
        return not self._none_is_left()

    def drains_have_ended(self, but_of: Sequence[Endpoint]) -> bool:
        """Whether others than these have been drained, or are so no more, since they were looked at."""
        known = self._standings
        return any(each.drained is not known[each].drained for each in self.draining if each not in but_of)

    def _none_is_left(self) -> bool:
        """Whether nobody is routable, and somebody is ejected."""
        standings = self._standings.values()
        return all(each.out is not None for each in standings) and any(
            each.breaker is BreakerState.OPEN for each in standings
        )

    def line_up(self) -> None:
        """Make new tuples, by whose identity others know that the fleet has changed."""
        standings = self._standings.items()
        self.routable = tuple([each for each, standing in standings if standing.out is None])
        out = [(each, standing.out) for each, standing in standings if standing.out is not None]
        self.out_of_service = tuple(out)
        self.ejected = tuple([each for each, state in out if state == EJECTED])
        self.draining = tuple([each for each, standing in standings if standing.draining])
        self.trials = any(standing.breaker is not BreakerState.CLOSED for _, standing in standings)


def _standing(endpoint: Endpoint) -> _Standing:
    out = None if endpoint.routable else shown_state(endpoint)
    return _Standing(out, endpoint.breaker.state, endpoint.draining, endpoint.drained)
