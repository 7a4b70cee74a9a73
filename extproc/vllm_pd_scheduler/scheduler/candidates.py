"""The endpoints of one role that a pick may choose from, at a cost that does not grow with the fleet.

- Which endpoints are saturated or on trial is known from the pick before, except for those whose load has
  changed since.
- Of more than ``LARGE_FLEET`` endpoints a strategy is offered a sample, if that is enough for it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Container, Sequence
from random import Random
from typing import NamedTuple

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from ..prediction.prefix_index import Holder
from ..request.context import RequestContext

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
    members: Container[object]
    """Has the same members as ``endpoints``, and is quick to ask."""
    exclude: Collection[Endpoint] = ()
    """Members that must not be chosen: the strategy is asked for as many more."""


class Candidates:
    """The endpoints of ``role`` in ``registry``: those that are routable and neither on trial nor saturated.

    - An ejected endpoint comes back by one trial request. A second one at the same time would tell nothing
      more and could be lost too, so endpoints on trial are candidates only if there are no others.
    - The same holds for saturated ones. ``saturated`` says whether one is at a time; without a limit
      (``limited``) only those can be that have said so.

    ``random`` draws the samples. Times are monotonic seconds.
    """

    def __init__(
        self,
        registry: Registry,
        role: InstanceRole,
        saturated: Callable[[Endpoint, float], bool],
        limited: bool,
        random: Random,
    ) -> None:
        self._registry = registry
        self._role = role
        self._is_saturated = saturated
        self._limited = limited
        self._random = random
        self._changed = registry.watch(role)
        self._routable: tuple[Endpoint, ...] = ()
        self._by_holder: dict[Holder, Endpoint] = {}
        """Of ``_routable``."""
        self._holders = 0
        """The set of these holders, as :meth:`PrefixMatch.longest` takes it."""
        self._on_trial: set[Endpoint] = set()
        self._saturated: set[Endpoint] = set()
        self._busy: dict[Endpoint, float] = {}
        """Endpoints that are saturated until a time, which is their entry in ``_busy_until``."""
        self._busy_until: list[tuple[float, int, Endpoint]] = []
        """A heap; the number, from ``_entries``, only keeps endpoints from being compared."""
        self._entries = itertools.count()
        self._candidates: tuple[Endpoint, ...] = ()
        self._left_out: list[set[Endpoint]] = []
        """Whose members are routable and not in ``_candidates``."""
        self._sample: Sequence[Endpoint] = ()
        self._sampled: tuple[object, ...] = ()
        """For which the last sample was drawn: a request, a time, and those to choose from."""

    def __contains__(self, endpoint: object) -> bool:
        """Whether an endpoint was a candidate when they were last asked for."""
        known = isinstance(endpoint, Endpoint) and self._by_holder.get(endpoint.holder) is endpoint
        return known and not any(endpoint in members for members in self._left_out)

    def all(self, now: float, exclude: Collection[Endpoint] = ()) -> tuple[Endpoint, ...]:
        """Return all candidates but those in ``exclude``."""
        self._refresh(now)
        if not exclude:
            return self._candidates
        return _without(self._candidates, exclude) or self._best(_without(self._routable, exclude))[0]

    def offer_all(self, now: float, exclude: Collection[Endpoint]) -> Offer:
        """Offer all candidates, for a strategy that does not accept a sample."""
        self._refresh(now)
        if len(self._candidates) <= LARGE_FLEET:
            endpoints = self.all(now, exclude)
            return Offer(endpoints, endpoints)
        return Offer(self._candidates, self, exclude)

    def offer_sample(
        self, request: RequestContext, exclude: Collection[Endpoint], *, prefixes: bool
    ) -> Offer:
        """Offer all candidates of a small fleet; of a large one, some that are drawn at random.

        With ``prefixes``, those with the longest cached prefixes of the request's prompt are among them. For
        one request at one time (``request.now``) the draw is always the same.
        """
        self._refresh(request.now)
        if len(self._candidates) <= LARGE_FLEET:
            return self.offer_all(request.now, exclude)
        sampled = request, request.now, self._candidates
        if self._sampled != sampled:
            self._sampled, self._sample = sampled, self._random.choices(self._candidates, k=SAMPLE)
        drawn = dict.fromkeys(self._sample)
        if prefixes:
            drawn.update(dict.fromkeys(self._longest(request)))
        for endpoint in exclude:
            drawn.pop(endpoint, None)
        return Offer(tuple(drawn), drawn) if drawn else self.offer_all(request.now, exclude)

    def some(self) -> Sequence[Endpoint]:
        """Return all routable endpoints of a small fleet; of a large one, some that are drawn at random."""
        routable = self._registry.routable(self._role)
        return routable if len(routable) <= LARGE_FLEET else self._random.choices(routable, k=SAMPLE)

    def has_room(self, now: float) -> bool:
        """Whether one candidate is not saturated, or there are none."""
        self._refresh(now)
        return not self._candidates or self._candidates[0] not in self._saturated

    def room_at(self, now: float) -> float:
        """Return when the next endpoint is to be asked again that has said that it is full; else infinity."""
        self._refresh(now)
        return self._busy_until[0][0] if self._busy_until else math.inf

    def most_cached(self, request: RequestContext) -> Endpoint | None:
        """Return the routable endpoint with the longest cached prefix of the prompt, if one has any of it."""
        self._refresh(request.now)
        longest = request.match.longest(1, self._holders)
        return self._by_holder[longest[0]] if longest else None

    def _longest(self, request: RequestContext) -> list[Endpoint]:
        turn = self._random.randrange(self._holders.bit_length())
        holders = request.match.longest(LONGEST, self._holders, turn, len(self._routable) * COMMON)
        endpoints = map(self._by_holder.__getitem__, holders)
        return [e for e in endpoints if not any(e in members for members in self._left_out)]

    def _refresh(self, now: float) -> None:
        """Look at the endpoints that may have become, or ceased to be, saturated or on trial."""
        registry, routable = self._registry, self._registry.routable(self._role)
        moved = routable is not self._routable
        if moved:
            self._forget(routable)
        while self._busy_until and self._busy_until[0][0] <= now:
            until, _, endpoint = heapq.heappop(self._busy_until)
            if self._busy.get(endpoint) == until:
                del self._busy[endpoint]
            self._changed.add(endpoint)
        if self._limited or registry.trials or self._saturated or now < registry.busy_until:
            for endpoint in self._changed:
                moved |= self._look_at(endpoint, now)
        self._changed.clear()
        if moved:
            self._candidates, self._left_out = self._best(routable)

    def _forget(self, routable: tuple[Endpoint, ...]) -> None:
        """Begin anew, since other endpoints are routable than before."""
        self._routable = routable
        self._by_holder = {endpoint.holder: endpoint for endpoint in routable}
        self._holders = self._registry.prefixes.mask_of(self._by_holder)
        self._on_trial, self._saturated, self._busy, self._busy_until = set(), set(), {}, []
        self._changed.update(routable)

    def _look_at(self, endpoint: Endpoint, now: float) -> bool:
        """Return whether the endpoint has become, or ceased to be, saturated or on trial."""
        until = endpoint.busy_until
        if until > now and self._busy.get(endpoint) != until:
            self._busy[endpoint] = until
            heapq.heappush(self._busy_until, (until, next(self._entries), endpoint))
        moved, saturated = False, self._is_saturated(endpoint, now)
        for members, is_member in ((self._on_trial, endpoint.on_trial), (self._saturated, saturated)):
            if is_member is not (endpoint in members):
                (members.add if is_member else members.remove)(endpoint)
                moved = True
        return moved

    def _best(self, endpoints: tuple[Endpoint, ...]) -> tuple[tuple[Endpoint, ...], list[set[Endpoint]]]:
        """Return those to choose from, and the sets of which they are not members."""
        left_out = []
        for members in (self._on_trial, self._saturated):
            others = _without(endpoints, members)
            if others:
                endpoints = others
                left_out.append(members)
        return endpoints, left_out


def _without(endpoints: tuple[Endpoint, ...], left_out: Collection[Endpoint]) -> tuple[Endpoint, ...]:
    return tuple(itertools.filterfalse(left_out.__contains__, endpoints)) if left_out else endpoints
