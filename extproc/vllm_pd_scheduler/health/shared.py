"""Who looks at which instance, where several replicas of the scheduler watch one fleet.

One replica probes an instance for all, and tells the others what it finds. They believe good news alone, and
only of an instance that is well in their own eyes. All that is worse or new makes each look for itself: a
problem, another address, another process, other models. So no replica takes an instance out of another's
service, brings it back, or leads another's requests elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..fleet.breaker import BreakerState
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import canonical_ip
from .finding import Finding, NotAFinding, digest_of, read, write

HEARD_INTERVALS = 2.0
"""For how many intervals what was heard of an instance stands for a look of our own."""
OWN_LOOK_S = 60.0
"""After so many seconds at the latest, and half as many at the earliest, we look ourselves at an instance of
which others tell us: it may be cut off from us, or be another one than they say."""
LEAST_INTERVALS = 0.5
"""How often findings of one instance are believed, on average: more would teach more than is true."""
_BURST_INTERVALS = 2.0
"""By how much they may come earlier."""

Counts = list[tuple[int, float]]
"""Requests and their tokens on each rank of an instance."""


class Peers(Protocol):
    """The other replicas; see :class:`vllm_pd_scheduler.replicas.probes.Probes`."""

    def ours(self, endpoint: Endpoint) -> bool:
        """Whether we are the one that probes an instance for all."""
        ...

    def asks(self, endpoint: Endpoint) -> None:
        """Tell them that we ask it now."""
        ...

    def finds(self, endpoint: Endpoint, found: bytes) -> None:
        """Tell them what we have found; nothing: that it is not well."""
        ...


class Watcher(Protocol):
    """Who probes: the monitor."""

    def heard(self, endpoint: Endpoint, finding: Finding, counts: Counts) -> None:
        """Take a finding as if it were its own, with what was there when the instance was asked."""
        ...

    def look(self, endpoint: Endpoint) -> None:
        """Probe an instance now."""
        ...


@dataclass(slots=True)
class _Known:
    """What is known of an instance that others may probe."""

    look_by: float
    """When we look ourselves, whatever is heard."""
    heard_at: float | None = None
    """When others have last told that it is well; ``None``: they have not, or their word is in doubt."""
    earned_at: float = 0.0
    """Until when the findings that were believed would last if they came as often as is usual."""
    asked: tuple[str, int, Counts] | None = None
    """Who asks it now, and what is there of which generation of its process."""


@dataclass(slots=True)
class Shared:
    """Decides which instances we look at, tells the others what we find, and judges what they tell.

    Without ``peers`` all instances are ours. ``interval`` is that of the probes.
    """

    watcher: Watcher
    registry: Registry
    clock: Callable[[], float]
    interval: float
    peers: Peers | None = None
    _known: dict[Endpoint, _Known] = field(default_factory=dict)

    # -- our own probes

    def looks(self, endpoint: Endpoint) -> bool:
        """Whether it is for us to probe an instance now."""
        if self.peers is None or self.peers.ours(endpoint) or not self._sound(endpoint):
            return True
        known, now = self._of(endpoint), self.clock()
        return known.heard_at is None or now >= min(self._stale_at(known.heard_at), known.look_by)

    def pause(self, endpoint: Endpoint, usual: float) -> float:
        """Return after how many seconds to ask again whether it is for us, if that is sooner than usual."""
        known = self._known.get(endpoint)
        if known is None or known.heard_at is None:
            return usual
        left = self._stale_at(known.heard_at) - self.clock()
        return min(usual, left) if left > 0.0 else usual

    def asks(self, endpoint: Endpoint) -> None:
        """Note that a probe of ours begins."""
        if self.peers is not None:
            self.peers.asks(endpoint)

    def finds(self, endpoint: Endpoint, finding: Finding | None) -> None:
        """Note what a probe of ours has found; ``None``: that the instance is not well."""
        if self.peers is not None:
            self._of(endpoint).look_by = self._next_look()
            if self.peers.ours(endpoint):
                self.peers.finds(endpoint, b"" if finding is None else write(finding))

    def removed(self, endpoint: Endpoint) -> None:
        """Forget an instance."""
        self._known.pop(endpoint, None)

    # -- what others tell

    def asked(self, endpoint: Endpoint, by: str) -> None:
        """Note what is there while another replica asks an instance: its answer cannot know of more."""
        counts = [(each.in_flight, each.tokens) for each in self.registry.ranks_of(endpoint)]
        self._of(endpoint).asked = by, endpoint.generation, counts

    def found(self, endpoint: Endpoint, by: str, told: bytes) -> bool:
        """Judge what another replica has found; return whether that is something that can be."""
        try:
            finding = read(told) if told else None
        except NotAFinding:
            return False
        if finding is not None and len(finding.pages) not in (0, len(self.registry.ranks_of(endpoint))):
            return False
        if self.peers is None or not self.peers.ours(endpoint):
            self._judge(endpoint, by, finding)
        return True

    def _judge(self, endpoint: Endpoint, by: str, finding: Finding | None) -> None:
        known, now = self._of(endpoint), self.clock()
        trusted = known.heard_at is not None
        if finding is None and not trusted:
            return  # we look ourselves already
        if known.earned_at - now > _BURST_INTERVALS * self.interval:
            return
        known.earned_at = max(known.earned_at, now) + LEAST_INTERVALS * self.interval
        if finding is not None and not self._news(endpoint, finding):
            known.heard_at = now
            if self._sound(endpoint):
                self.watcher.heard(endpoint, finding, self._counts(endpoint, known, by))
            return
        known.heard_at = None
        if trusted:
            self.watcher.look(endpoint)

    def _counts(self, endpoint: Endpoint, known: _Known, by: str) -> Counts:
        """Return what was there when a replica asked; what is there now, if that was not heard."""
        asked, known.asked = known.asked, None
        if asked is not None and asked[:2] == (by, endpoint.generation):
            return asked[2]
        return [(each.in_flight, each.tokens) for each in self.registry.ranks_of(endpoint)]

    def _news(self, endpoint: Endpoint, finding: Finding) -> bool:
        """Whether it tells of something else than what we have seen there."""
        if canonical_ip(endpoint.instance.host) is None and finding.address != endpoint.address:
            return True
        started = finding.pages[0].started_at if finding.pages else None
        if started is not None and started != endpoint.started_at:
            return True
        return bool(finding.models) and finding.models != digest_of(endpoint)

    def _sound(self, endpoint: Endpoint) -> bool:
        """Whether an instance is well in our own eyes: those of our probes and of our requests."""
        breaker = endpoint.breaker
        requests_fail = breaker.state is not BreakerState.CLOSED or breaker.failures > 0
        return endpoint.probes.healthy is True and not endpoint.probes.streak and not requests_fail

    def _of(self, endpoint: Endpoint) -> _Known:
        known = self._known.get(endpoint)
        if known is None:
            known = self._known[endpoint] = _Known(self._next_look())
        return known

    def _next_look(self) -> float:
        return self.clock() + OWN_LOOK_S * (1.0 - 0.5 * random.random())

    def _stale_at(self, heard_at: float) -> float:
        return heard_at + HEARD_INTERVALS * self.interval
