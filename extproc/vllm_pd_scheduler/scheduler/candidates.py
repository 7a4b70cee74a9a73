"""The endpoints that a pick may choose from. Of many, a strategy is offered a sample, if that is enough."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence, Set
from random import Random
from typing import NamedTuple

from ..fleet.endpoint import Endpoint
from ..prediction.prefix_index import PrefixIndex
from ..request.context import RequestContext
from .availability import Availability
from .remaining import Remaining

LARGE_FLEET = 128
"""Endpoints of a role up to which all of them are offered to a strategy.

A choice: to rank so many takes about as long as all else that is done for a request.
"""
SAMPLE = 32
"""Endpoints that are drawn from a large fleet for a pick.

The best of them is among the best 10 % of the fleet with a probability of 97 % (1 - 0.9**32). In the
simulator, with 160 P and 160 D, the mean TTFT was within 2 % of that with all endpoints looked at, for 32 as
for 64.
"""
LONGEST = 8
"""Endpoints that are added to a sample because they have the longest cached prefixes.

A choice: enough to find one without a queue among them.
"""
COMMON = 0.25
"""Share of the endpoints from which on a prefix is common: a sample has some of those that have it anyway.

That it has none has a probability of 0.01 % (0.75**32).
"""


class Offer(NamedTuple):
    """What a strategy is offered."""

    endpoints: tuple[Endpoint, ...]
    exclude: Collection[Endpoint] = ()
    """Members that must not be chosen: the strategy is asked for as many more."""


class Candidates:
    """Those of ``endpoints`` that are neither on trial nor saturated; if all are, those that are less so.

    ``endpoints`` are routable ones of one role, and ``availability`` is that of the role. ``random`` draws
    the samples.
    """

    def __init__(
        self,
        endpoints: tuple[Endpoint, ...],
        availability: Availability,
        prefixes: PrefixIndex,
        random: Random,
    ) -> None:
        self._remaining = Remaining(endpoints)
        self.endpoints = self._remaining.all
        self._availability = availability
        self._random = random
        self._by_holder = {endpoint.holder: endpoint for endpoint in endpoints}
        self._holders = prefixes.mask_of(self._by_holder)
        """The set of these holders, as :meth:`PrefixMatch.longest` takes it."""
        self._version = -1
        """Of the availability, of which the following is known."""
        self._left_out: tuple[Set[Endpoint], ...] = ()
        """Whom to leave out, if others remain: this failing, the next."""
        self._out: Set[Endpoint] = frozenset()
        """The first of these that leaves others: the endpoints that are no candidates."""
        self._kind = -1
        """Its place in ``_left_out``; -1: it is none of them, but empty."""
        self._left_out_of = -1, -1
        """The version and the kind that ``_remaining`` is up to date with."""
        self._drawn: Sequence[Endpoint] = ()
        self._drawn_for: tuple[object, ...] = ()
        """A request, a time and a version."""

    @property
    def on_trial(self) -> Set[Endpoint]:
        """Those that were on trial when candidates were last asked for."""
        return self._left_out[1] if self._left_out else frozenset()

    @property
    def many(self) -> bool:
        """Whether there were so many that a sample is drawn, if the strategy accepts one."""
        return len(self.endpoints) - len(self._out) > LARGE_FLEET

    def __contains__(self, endpoint: object) -> bool:
        """Whether an endpoint was a candidate when they were last asked for."""
        return endpoint in self.endpoints and endpoint not in self._out

    def all(self, now: float, exclude: Collection[Endpoint] = ()) -> tuple[Endpoint, ...]:
        """Return all candidates but those in ``exclude``."""
        self._refresh(now)
        if self._left_out_of != (self._version, self._kind):
            version, kind = self._left_out_of
            moved = self._availability.moved_since(version) if kind == self._kind else None
            self._remaining.leave_out(self._out, moved)
            self._left_out_of = self._version, self._kind
        candidates = self._remaining.get()
        if not exclude:
            return candidates
        if others := _without(candidates, exclude):
            return others
        endpoints = _without(self.endpoints, exclude)
        return next(filter(None, (_without(endpoints, members) for members in self._left_out)), endpoints)

    def offer_all(self, now: float, exclude: Collection[Endpoint]) -> Offer:
        """Offer all candidates, for a strategy that does not accept a sample."""
        endpoints = self.all(now)
        if len(endpoints) > LARGE_FLEET:
            return Offer(endpoints, exclude)
        if exclude:
            endpoints = self.all(now, exclude)
        return Offer(endpoints)

    def offer_sample(
        self, request: RequestContext, exclude: Collection[Endpoint], *, prefixes: bool
    ) -> Offer:
        """Offer all candidates of a small fleet; of a large one, some that are drawn at random.

        With ``prefixes``, those with the longest cached prefixes of the request's prompt are among them. For
        one request at one time (``request.now``) the draw is always the same.
        """
        self._refresh(request.now)
        if len(self.endpoints) - len(self._out) <= LARGE_FLEET:
            return self.offer_all(request.now, exclude)
        drawn_for = request, request.now, self._version
        if self._drawn_for != drawn_for:
            self._drawn_for, self._drawn = drawn_for, self._draw(request.now)
        offered = dict.fromkeys(self._drawn)
        if prefixes:
            offered.update(dict.fromkeys(self._longest(request)))
        for endpoint in exclude:
            offered.pop(endpoint, None)
        return Offer(tuple(offered)) if offered else self.offer_all(request.now, exclude)

    def some(self) -> Sequence[Endpoint]:
        """Return all endpoints, candidates or not; of many, some that are drawn at random."""
        if len(self.endpoints) <= LARGE_FLEET:
            return self.endpoints
        return self._random.choices(self.endpoints, k=SAMPLE)

    def has_room(self, now: float, exclude: Collection[Endpoint] = ()) -> bool:
        """Whether one candidate that is not in ``exclude`` is not saturated, or there are none."""
        self._refresh(now)
        either, on_trial, saturated = self._left_out
        if exclude:
            others = _without(self.endpoints, exclude)
            out = saturated if all(each in on_trial for each in others) else either
            return not others or not all(each in out for each in others)
        size = len(self.endpoints)
        if len(on_trial) == size:
            return not size or len(saturated) < size
        return len(either) < size

    def most_cached(self, request: RequestContext) -> Endpoint | None:
        """Return the endpoint with the longest cached prefix of the prompt, if one has any of it."""
        longest = request.match.longest(1, self._holders)
        return self._by_holder[longest[0]] if longest else None

    def longest_cached(self, request: RequestContext) -> list[Endpoint]:
        """Return endpoints with the longest cached prefixes of the prompt, up to :data:`LONGEST`."""
        return [self._by_holder[each] for each in request.match.longest(LONGEST, self._holders)]

    def _draw(self, now: float) -> Sequence[Endpoint]:
        out, size = self._out, len(self.endpoints)
        count = SAMPLE * size // (size - len(out))
        if count > 4 * SAMPLE:
            return self._random.choices(self.all(now), k=SAMPLE)
        # Without a list of all candidates, which changes with every request when many are nearly saturated.
        return [e for e in self._random.choices(self.endpoints, k=count) if e not in out]

    def _longest(self, request: RequestContext) -> list[Endpoint]:
        turn, out = self._random.randrange(self._holders.bit_length()), self._out
        holders = request.match.longest(LONGEST, self._holders, turn, len(self.endpoints) * COMMON)
        return [e for e in map(self._by_holder.__getitem__, holders) if e not in out]

    def _refresh(self, now: float) -> None:
        availability = self._availability
        availability.refresh(now)
        if self._version == availability.version:
            return
        self._version = availability.version
        self._left_out = availability.either, availability.on_trial, availability.saturated
        if len(self.endpoints) < availability.size:
            self._left_out = tuple({e for e in members if e in self.endpoints} for members in self._left_out)
        size = len(self.endpoints)
        fitting = (kind for kind, members in enumerate(self._left_out) if len(members) < size)
        self._kind = next(fitting, -1)
        self._out = self._left_out[self._kind] if self._kind >= 0 else frozenset()


def _without(endpoints: tuple[Endpoint, ...], left_out: Collection[Endpoint]) -> tuple[Endpoint, ...]:
    return tuple(itertools.filterfalse(left_out.__contains__, endpoints)) if left_out else endpoints
