"""What the ends of requests say of the instances that had them: who serves, who fails, and who is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models import By, InstanceRole, InstanceState
from .breaker import BreakerState
from .endpoint import Endpoint

if TYPE_CHECKING:
    from .registry import Registry


class Ends:
    """Counts ends by instance, and ejects those that fail. Part of the registry."""

    def __init__(self, registry: Registry) -> None:
        self.busy_until = 0.0
        """Until when some endpoint is left alone because it said that it is full."""
        self._registry = registry

    def succeeded(self, endpoint: Endpoint, handed_over_by: Endpoint | None = None) -> None:
        """Record a request that an instance served: a D maybe with what a P has handed over."""
        registry = self._registry
        endpoint.served()
        registry.pairs.served(handed_over_by, endpoint)
        if handed_over_by is not None and not registry.failed_transfers.fail_at(endpoint):
            registry.pairs.succeeded(handed_over_by, endpoint)
        if endpoint.breaker.succeeded():
            if registry.journal is not None:
                registry.journal.recovered(endpoint)
            registry.changes.note(By.REQUEST, endpoint)

    def failed(
        self, endpoint: Endpoint, reason: str, now: float, handed_over_by: Endpoint | None = None
    ) -> None:
        """Record a request that an instance failed; it may be ejected for that.

        If all that it has failed in a row was ``handed_over_by`` one and the same P, and it serves others,
        that pair is left out in its place (see :mod:`.pairs`). If that P is gone, it may be the reason, and
        the end is doubtful.

        No more than ``max_ejected_share`` of a role is out at once, so that a fault they share (a bad
        client, a broken model) does not end all service; an instance on trial goes out in any case.
        """
        registry = self._registry
        if handed_over_by is not None and handed_over_by not in registry:
            self.doubtful(endpoint, reason, now)
            return
        decode = endpoint.instance.role is InstanceRole.DECODE
        if decode and endpoint in registry:
            registry.pairs.failed(handed_over_by, endpoint, now)
        if endpoint.breaker.failed() and not (decode and registry.pairs.explain(endpoint)):
            self._eject_by_us(endpoint, reason, now)

    def errored(
        self,
        endpoint: Endpoint,
        before: Sequence[Endpoint],
        reason: str,
        now: float,
        handed_over_by: Endpoint | None = None,
    ) -> None:
        """Record a 500 for a request to which those ``before`` have answered 500 too.

        The first is a failure. With a second it may be the request's fault: then the failure is taken back,
        and what happened is doubtful for all. ``handed_over_by`` is the P whose hand-off the first had.
        """
        if not before:
            self.failed(endpoint, reason, now, handed_over_by)
            return
        if len(before) == 1:
            if handed_over_by is not None:
                self._registry.pairs.forgive(handed_over_by, before[0])
            if before[0].breaker.forgive():
                self._registry.changes.note(By.REQUEST, before[0])
            self.doubtful(before[0], reason, now)
        self.doubtful(endpoint, reason, now)

    def doubtful(self, endpoint: Endpoint, reason: str, now: float) -> None:
        """Record a request whose end says something of the instance only beside those of its peers.

        The instance is ejected if it has many of them and its peers have few. A trial stays undecided.
        """
        endpoint.doubts.doubtful()
        if self._odd(endpoint):
            self._eject_by_us(endpoint, f"{reason}, where others of its role serve", now)

    def stands_out(self, endpoint: Endpoint) -> bool:
        """Whether an instance, and not the fleet, is the reason for what happens there.

        It is unhealthy or ejected, or has many doubtful ends where its peers have few.
        """
        return endpoint.state is InstanceState.UNHEALTHY or self._odd(endpoint)

    def _odd(self, endpoint: Endpoint) -> bool:
        own, peers = endpoint.doubts, self._registry.routable(endpoint.instance.role)
        return own.odd_among(e.doubts for e in peers if e.doubts is not own)

    def overloaded(self, endpoint: Endpoint, now: float, retry_after: float | None = None) -> None:
        """Record that an instance is full: neither its failure nor a success.

        It is left alone for as long as it asks (``retry_after``, seconds), else for half a second, twice
        as long each time until it serves a request again.
        """
        endpoint.say_full(now, retry_after)
        self.busy_until = max(self.busy_until, endpoint.pause.until)

    def _eject_by_us(self, endpoint: Endpoint, reason: str, now: float) -> None:
        if self.eject(endpoint, reason, now) and (journal := self._registry.journal) is not None:
            journal.ejected(endpoint)

    def eject(self, endpoint: Endpoint, reason: str, now: float) -> bool:
        """Eject an instance unless too many of its role are out; return whether it is out since now."""
        if endpoint.breaker.state is BreakerState.OPEN:
            return False
        registry, breaker = self._registry, endpoint.breaker
        servers = {id(e.breaker): e.breaker for e in registry.endpoints(endpoint.instance.role)}
        out = sum(each is breaker or each.state is not BreakerState.CLOSED for each in servers.values())
        if allowed := out <= registry.policy.max_ejected_share * len(servers):
            for each in registry.ranks_of(endpoint):
                registry.pairs.ejected(each)
            breaker.open(now, reason)
            registry.changes.note(By.REQUEST, endpoint)
        return allowed
