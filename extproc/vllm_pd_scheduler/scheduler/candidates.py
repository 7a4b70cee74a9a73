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
        self._either: set[Endpoint] = set()
        self._version = 0
        """Changes with the sets above."""
        self._busy: dict[Endpoint, float] = {}
        """Endpoints that are saturated until a time, which is their entry in ``_busy_until``."""
        self._busy_until: list[tuple[float, int, Endpoint]] = []
        """A heap; the number, from ``_entries``, only keeps endpoints from being compared."""
        self._entries = itertools.count()
        self._all: tuple[Endpoint, ...] | None = None
        """All candidates, if they were asked for since ``_version`` has changed."""
        self._drawn: Sequence[Endpoint] = ()
        self._drawn_for: tuple[object, ...] = ()
        """A request, a time and a version."""

    def __contains__(self, endpoint: object) -> bool:
        """Whether an endpoint was a candidate when they were last asked for."""
        known = isinstance(endpoint, Endpoint) and self._by_holder.get(endpoint.holder) is endpoint
        return known and endpoint not in self._left_out()

    def all(self, now: float, exclude: Collection[Endpoint] = ()) -> tuple[Endpoint, ...]:
        """Return all candidates but those in ``exclude``."""
        self._refresh(now)
        if self._all is None:
            self._all = _without(self._routable, self._left_out())
        if not exclude:
            return self._all
        if others := _without(self._all, exclude):
            return others
        endpoints = _without(self._routable, exclude)
        choices = (
            _without(endpoints, members) for members in (self._either, self._on_trial, self._saturated)
        )
        return next(filter(None, choices), endpoints)

    def offer_all(self, now: float, exclude: Collection[Endpoint]) -> Offer:
        """Offer all candidates, for a strategy that does not accept a sample."""
        endpoints = self.all(now)
        if len(endpoints) > LARGE_FLEET:
            return Offer(endpoints, self, exclude)
        if exclude:
            endpoints = self.all(now, exclude)
        return Offer(endpoints, endpoints)

    def offer_sample(
        self, request: RequestContext, exclude: Collection[Endpoint], *, prefixes: bool
    ) -> Offer:
        """Offer all candidates of a small fleet; of a large one, some that are drawn at random.

        With ``prefixes``, those with the longest cached prefixes of the request's prompt are among them. For
        one request at one time (``request.now``) the draw is always the same.
        """
        self._refresh(request.now)
        if len(self._routable) - len(self._left_out()) <= LARGE_FLEET:
            return self.offer_all(request.now, exclude)
        drawn_for = request, request.now, self._version
        if self._drawn_for != drawn_for:
            self._drawn_for, self._drawn = drawn_for, self._draw(request.now)
        offered = dict.fromkeys(self._drawn)
        if prefixes:
            offered.update(dict.fromkeys(self._longest(request)))
        for endpoint in exclude:
            offered.pop(endpoint, None)
        return Offer(tuple(offered), offered) if offered else self.offer_all(request.now, exclude)

    def some(self) -> Sequence[Endpoint]:
        """Return all routable endpoints of a small fleet; of a large one, some that are drawn at random."""
        routable = self._registry.routable(self._role)
        return routable if len(routable) <= LARGE_FLEET else self._random.choices(routable, k=SAMPLE)

    def has_room(self, now: float) -> bool:
        """Whether one candidate is not saturated, or there are none."""
        self._refresh(now)
        size = len(self._routable)
        if len(self._on_trial) == size:
            return not size or len(self._saturated) < size
        return len(self._either) < size

    def room_at(self, now: float) -> float:
        """Return when the next endpoint is to be asked again that has said that it is full; else infinity."""
        self._refresh(now)
        return self._busy_until[0][0] if self._busy_until else math.inf

    def most_cached(self, request: RequestContext) -> Endpoint | None:
        """Return the routable endpoint with the longest cached prefix of the prompt, if one has any of it."""
        self._refresh(request.now)
        longest = request.match.longest(1, self._holders)
        return self._by_holder[longest[0]] if longest else None

    def _left_out(self) -> Collection[Endpoint]:
        """Return the routable endpoints that are no candidates."""
        size = len(self._routable)
        sets = (self._either, self._on_trial, self._saturated)
        return next((members for members in sets if len(members) < size), ())

    def _draw(self, now: float) -> Sequence[Endpoint]:
        left_out, size = self._left_out(), len(self._routable)
        count = SAMPLE * size // (size - len(left_out))
        if count > 4 * SAMPLE:
            return self._random.choices(self.all(now), k=SAMPLE)
        # Without a tuple of all candidates, which changes with every request when many are nearly saturated.
        return [e for e in self._random.choices(self._routable, k=count) if e not in left_out]

    def _longest(self, request: RequestContext) -> list[Endpoint]:
        turn, left_out = self._random.randrange(self._holders.bit_length()), self._left_out()
        holders = request.match.longest(LONGEST, self._holders, turn, len(self._routable) * COMMON)
        return [e for e in map(self._by_holder.__getitem__, holders) if e not in left_out]

    def _refresh(self, now: float) -> None:
        """Look at the endpoints that may have become, or ceased to be, saturated or on trial."""
        registry = self._registry
        if self._routable is not registry.routable(self._role):
            self._begin_anew()
        while self._busy_until and self._busy_until[0][0] <= now:
            until, _, endpoint = heapq.heappop(self._busy_until)
            if self._busy.get(endpoint) == until:
                del self._busy[endpoint]
            self._changed.add(endpoint)
        if self._limited or registry.trials or self._saturated or now < registry.busy_until:
            for endpoint in self._changed:
                if endpoint.holder in self._by_holder:
                    self._look_at(endpoint, now)
        self._changed.clear()

    def _begin_anew(self) -> None:
        """Forget what was known, since other endpoints are routable than before."""
        self._routable = routable = self._registry.routable(self._role)
        self._by_holder = {endpoint.holder: endpoint for endpoint in routable}
        self._holders = self._registry.prefixes.mask_of(self._by_holder)
        self._on_trial, self._saturated, self._either = set(), set(), set()
        self._busy, self._busy_until = {}, []
        self._changed.update(routable)
        self._version, self._all = self._version + 1, None

    def _look_at(self, endpoint: Endpoint, now: float) -> None:
        until, on_trial = endpoint.busy_until, endpoint.on_trial
        if until > now and self._busy.get(endpoint) != until:
            self._busy[endpoint] = until
            heapq.heappush(self._busy_until, (until, next(self._entries), endpoint))
        saturated = self._is_saturated(endpoint, now)
        if on_trial is (endpoint in self._on_trial) and saturated is (endpoint in self._saturated):
            return
        for members, is_member in (
            (self._on_trial, on_trial),
            (self._saturated, saturated),
            (self._either, on_trial or saturated),
        ):
            (members.add if is_member else members.discard)(endpoint)
        self._version, self._all = self._version + 1, None


def _without(endpoints: tuple[Endpoint, ...], left_out: Collection[Endpoint]) -> tuple[Endpoint, ...]:
    return tuple(itertools.filterfalse(left_out.__contains__, endpoints)) if left_out else endpoints
