"""LoRA affinity: a request for an adapter goes where that is loaded, as long as this costs no waiting."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from ..request.context import RequestContext
from .availability import Availability
from .candidates import Candidates, Offer

SHARE = 1.25
"""An endpoint with the adapter is preferred while it has at most this share of the work of the least busy
candidate, and ``SLACK`` more."""
SLACK = {InstanceRole.PREFILL: 0.1, InstanceRole.DECODE: 2.0}
"""In seconds of prefill left on a P, and in requests on a D.

To load an adapter that the host has in memory takes some 10 ms, from a disk up to a second, once. What waits
behind others waits each time. So this is a choice that lets an adapter spread as soon as its requests would
queue: an endpoint gets at most so much more than the others.
"""


class AdapterCandidates(Candidates):
    """Candidates for the requests of one LoRA adapter: those that have it loaded, if they are not busier."""

    def __init__(
        self,
        endpoints: tuple[Endpoint, ...],
        availability: Availability,
        registry: Registry,
        random: Random,
        adapter: str,
    ) -> None:
        super().__init__(endpoints, availability, registry.prefixes, random)
        self._registry = registry
        self._adapter = adapter
        self._adapters_version = -1
        """Of the registry, for which the following holds."""
        self._loaded: tuple[Endpoint, ...] = ()

    def offer_all(self, now: float, exclude: Collection[Endpoint]) -> Offer:
        """Offer those that have the adapter loaded and are not clearly busier than the others; else all."""
        return self._prefer(super().offer_all(now, exclude), now)

    def offer_sample(
        self, request: RequestContext, exclude: Collection[Endpoint], *, prefixes: bool
    ) -> Offer:
        """Offer the same; in place of all, a sample of them."""
        return self._prefer(super().offer_sample(request, exclude, prefixes=prefixes), request.now)

    def _prefer(self, offer: Offer, now: float) -> Offer:
        if self._adapters_version != self._registry.models.adapters_version:
            self._adapters_version = self._registry.models.adapters_version
            self._loaded = tuple(each for each in self.endpoints if self._adapter in each.models.loaded)
        offered, exclude = offer
        if not (self._loaded and offered):
            return offer
        limit = SHARE * min(_work(each, now) for each in offered) + SLACK[offered[0].instance.role]
        sampled = self.many  # then those that have it loaded need not be among them
        preferred = tuple(
            each
            for each in self._loaded
            if each not in exclude
            and (each in self if sampled else each in offered)
            and _work(each, now) <= limit
        )
        return Offer(preferred) if preferred else offer


def _work(endpoint: Endpoint, now: float) -> float:
    """Return what a new request would share an endpoint with: seconds of prefill, or requests."""
    if endpoint.instance.role is InstanceRole.PREFILL:
        return endpoint.prefill.remaining(now)
    return endpoint.requests
