"""How much work each role has, beside what it can do: what an autoscaler needs to know.

A backlog, and the share of a role that is in use, count the requests of this scheduler only. So over several
schedulers of one fleet their sum is the fleet's. What is left of a limit (slack) is what a request would find
that came to this scheduler: of several schedulers the least counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..fleet.reservation import Reservation
from ..models import InstanceRole
from . import Scheduler

LEAST_ROOM = 0.01
"""Share of a limit that counts as left for requests at least, where an idle step alone takes all of it."""


class Queue(Protocol):
    """The requests that wait in the scheduler, as :class:`..admission.queue.RequestQueue` has them."""

    def waiting(self, role: InstanceRole) -> int:
        """Return how many wait for an endpoint of a role."""
        ...

    def work_of(self, role: InstanceRole) -> float:
        """Return the predicted seconds of prefill of these."""
        ...


class RoleLoad:
    """Reads the load of P and of D from the registry and the queue, when somebody asks."""

    def __init__(self, scheduler: Scheduler, queue: Queue) -> None:
        self._scheduler = scheduler
        self._registry: Registry = scheduler.registry
        self._queue = queue

    def prefill_backlog(self, now: float) -> float:
        """Return the predicted seconds until P are done with our prefills, sent there or waiting here.

        A request that waits here since all D are full waits for D, however idle P are.
        """
        work = 0.0 if self._decode_is_full(now) else self._queue.work_of(InstanceRole.PREFILL)
        endpoints = self._registry.endpoints(InstanceRole.PREFILL)
        work += math.fsum(own_prefills(each, now) for each in endpoints)
        return work / self._size(InstanceRole.PREFILL)

    def decode_backlog(self, now: float) -> float:
        """Return the predicted seconds until the last of our requests that wait for D begins to decode.

        Such a request waits until others end: so many end in a second as all answers together have tokens.
        """
        endpoints, answer = self._able(InstanceRole.DECODE), max(1.0, self._registry.load.output_tokens)
        ends = math.fsum(
            max(1.0, each.metrics.running if each.metrics else 0.0) / (answer * max(1e-6, each.decode_step))
            for each in endpoints
        )
        waiting = math.fsum(_own_waiting(each) for each in endpoints)
        waiting += self._queue.waiting(InstanceRole.DECODE)
        if self._decode_is_full(now):
            waiting += self._queue.waiting(InstanceRole.PREFILL)
        return waiting / ends if ends > 0 else 0.0

    def decode_use(self) -> Iterator[tuple[str, float]]:
        """Yield the share of all D that our requests use: of the KV cache, of ``tpot_slo`` if that is set.

        Each is proportional to the load: at twice the requests it is twice as much.
        """
        endpoints = self._able(InstanceRole.DECODE)
        capacity = math.fsum(each.kv_capacity or 0.0 for each in endpoints)
        if capacity > 0:
            held = math.fsum(each.own_tokens for each in endpoints if each.kv_capacity)
            yield "kv_cache", held / capacity
        limit = self._scheduler.config.tpot_slo
        if limit is not None and endpoints:
            yield "step", math.fsum(_own_step(each, limit) for each in endpoints) / len(endpoints)

    def ttft_slack(self, now: float) -> float | None:
        """Return the seconds that a usual request would have left of ``ttft_slo``; less than 0 if it is late.

        ``None``: there is no such limit, or nothing is known yet.
        """
        limit, usual = self._scheduler.config.ttft_slo, self._registry.learning.usual_prefill
        endpoints = self._able(InstanceRole.PREFILL)
        if limit is None or usual is None or not endpoints:
            return None
        wait = min(each.prefill.remaining(now) for each in endpoints)
        if self._decode_is_full(now):
            wait += self.decode_backlog(now)
        else:
            wait += self._queue.work_of(InstanceRole.PREFILL) / len(endpoints)
        return limit - (wait + usual + self._registry.load.transfer + (self._next_step() or 0.0))

    def tpot_slack(self) -> float | None:
        """Return the seconds a token that a request would have left of ``tpot_slo`` on the D with most."""
        limit, step = self._scheduler.config.tpot_slo, self._next_step()
        return None if limit is None or step is None else limit - step

    def _next_step(self) -> float | None:
        """Return the predicted seconds of a step with one request more, on the D where that is least."""
        endpoints = self._able(InstanceRole.DECODE)
        own = self._registry.learning.usual_prompt
        steps = (each.decode.step(each.requests + 1, each.kv_tokens + own) for each in endpoints)
        return min(steps, default=None)

    def _decode_is_full(self, now: float) -> bool:
        return not self._scheduler.has_room(InstanceRole.DECODE, now)

    def _able(self, role: InstanceRole) -> Sequence[Endpoint]:
        return self._registry.routable(role)

    def _size(self, role: InstanceRole) -> int:
        return max(1, len(self._able(role)))


def own_prefills(endpoint: Endpoint, now: float) -> float:
    """Return the predicted seconds of the prefills that this scheduler has queued on a P."""
    load, left = endpoint.prefill, 0.0
    for place, queued in enumerate(load.pending):
        if isinstance(queued, Reservation) and not queued.elsewhere:
            done = 0.0 if place else min(queued.cost, max(0.0, now - load.head_at))
            left += queued.cost - done
    return left


def _own_waiting(endpoint: Endpoint) -> float:
    """Return how many of those that wait on a D, as last scraped, are ours: the share that we have of all."""
    if endpoint.metrics is None or endpoint.requests <= 0:
        return 0.0
    return endpoint.metrics.waiting * endpoint.own_in_flight / endpoint.requests


def _own_step(endpoint: Endpoint, limit: float) -> float:
    """Return what our requests take of that which a step's limit leaves for requests."""
    load = endpoint.decode
    ours = load.per_seq * endpoint.own_in_flight + load.per_kv_token * endpoint.own_tokens
    return ours / max(limit - load.base, LEAST_ROOM * limit)
