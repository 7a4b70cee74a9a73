"""Which endpoints of one role are saturated or on trial, known without a look at each of them."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Set

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole

KEPT_MOVES = 64
"""Changes that are remembered. After more of them it takes no longer to look at all endpoints."""


class Availability:
    """The routable endpoints of ``role`` in ``registry`` that are left out while there are others.

    - An ejected endpoint comes back by one trial request. A second one at the same time would tell nothing
      more and could be lost too.
    - ``saturated`` says whether an endpoint has too much to do at a time; without a limit (``limited``) only
      those can be saturated that have said so.

    What is known stays true until an endpoint's load changes, and only such ones are looked at again. Times
    are monotonic seconds.
    """

    def __init__(
        self,
        registry: Registry,
        role: InstanceRole,
        saturated: Callable[[Endpoint, float], bool],
        limited: bool,
    ) -> None:
        self.on_trial: Set[Endpoint] = set()
        self.saturated: Set[Endpoint] = set()
        self.either: Set[Endpoint] = set()
        self.version = 0
        """Changes with the sets above."""
        self._moved: deque[Endpoint] = deque(maxlen=KEPT_MOVES)
        """Endpoints that have come into the sets or left them, one for each of the last versions."""
        self._registry = registry
        self._lineup = registry.lineup(role)
        self._is_saturated = saturated
        self._limited = limited
        self._changed = registry.watch(role)
        self._routable: tuple[Endpoint, ...] = ()
        self._sets: tuple[set[Endpoint], ...] = ()
        self._members: frozenset[Endpoint] = frozenset()
        """Of ``_routable``."""
        self._busy: dict[Endpoint, float] = {}
        """Endpoints that are saturated until a time, which is their entry in ``_busy_until``."""
        self._busy_until: list[tuple[float, int, Endpoint]] = []
        """A heap; the number, from ``_entries``, only keeps endpoints from being compared."""
        self._entries = itertools.count()

    @property
    def size(self) -> int:
        """Number of routable endpoints of the role."""
        return len(self._routable)

    def room_at(self, now: float) -> float:
        """Return when the next endpoint is to be asked again that has said that it is full; else infinity."""
        self.refresh(now)
        return self._busy_until[0][0] if self._busy_until else math.inf

    def moved_since(self, version: int) -> list[Endpoint] | None:
        """Return the endpoints that may have come into the sets, or left them, since they had a version.

        ``None`` if all must be looked at: other endpoints are routable, or that is too long ago.
        """
        count = self.version - version
        return None if count > len(self._moved) else list(self._moved)[len(self._moved) - count :]

    def refresh(self, now: float) -> None:
        """Look at the endpoints that may have become, or ceased to be, saturated or on trial."""
        registry = self._registry
        if self._routable is not self._lineup.routable:
            self._begin_anew()
        while self._busy_until and self._busy_until[0][0] <= now:
            until, _, endpoint = heapq.heappop(self._busy_until)
            if self._busy.get(endpoint) == until:
                del self._busy[endpoint]
            self._changed.add(endpoint)
        if self._limited or registry.trials or self.saturated or now < registry.ends.busy_until:
            for endpoint in self._changed:
                if endpoint in self._members:
                    self._look_at(endpoint, now)
        self._changed.clear()

    def limit(self, limited: bool) -> None:
        """Look at all endpoints again, since other limits hold from now on."""
        self._limited = limited
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Forget what was known, since other endpoints are routable than before."""
        self._routable = self._lineup.routable
        self._members = frozenset(self._routable)
        self._sets = self.on_trial, self.saturated, self.either = set(), set(), set()
        self._busy, self._busy_until = {}, []
        self._changed.update(self._routable)
        self._moved.clear()
        self.version += 1

    def _look_at(self, endpoint: Endpoint, now: float) -> None:
        until, on_trial = endpoint.pause.until, endpoint.on_trial
        if until > now and self._busy.get(endpoint) != until:
            self._busy[endpoint] = until
            heapq.heappush(self._busy_until, (until, next(self._entries), endpoint))
        saturated = self._is_saturated(endpoint, now)
        if on_trial is (endpoint in self.on_trial) and saturated is (endpoint in self.saturated):
            return
        for members, is_member in zip(self._sets, (on_trial, saturated, on_trial or saturated), strict=True):
            (members.add if is_member else members.discard)(endpoint)
        self._moved.append(endpoint)
        self.version += 1
