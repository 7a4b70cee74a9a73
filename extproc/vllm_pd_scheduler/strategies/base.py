"""What a strategy is. Write ``score``; the rest is done here."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any, ClassVar, Protocol

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext

AGEING = 0.2
"""Seconds of work that a second of waiting makes up for."""


def all_requests(endpoints: Sequence[Endpoint]) -> list[float]:
    """Return :attr:`Endpoint.requests` of each. Written out: 1,000 calls would take half a millisecond."""
    found = []
    for endpoint in endpoints:
        metrics, ours = endpoint.metrics, endpoint.in_flight
        if metrics is not None:
            others = metrics.running + metrics.waiting - endpoint.in_flight_at_scrape
            found.append(ours + others if others > 0.0 else float(ours))
        else:
            found.append(float(ours))
    return found


class StrategySettings(Protocol):
    """What the built-in strategies read of the configuration; a strategy gets all of it.

    A protocol, since the configuration checks the names of strategies and so imports them.
    """

    @property
    def load_weight(self) -> float:
        """Weight of the load for ``weighted``."""
        ...

    @property
    def kv_cache_weight(self) -> float:
        """Weight of the KV-cache use for ``weighted``."""
        ...

    @property
    def latency_weight(self) -> float:
        """Weight of the latency for ``weighted``."""
        ...


class Strategy:
    """Ranks the endpoints of one role for one request. Each role has an object of its own.

    A strategy of your own overrides :meth:`score` (or :meth:`rank`, if it does not think in scores) and
    is named in the configuration by dotted path, ``"my_package.my_module:MyStrategy"``, or by the name
    of an entry point in the group ``vllm_pd_scheduler.strategies``.
    """

    reads_prefixes: ClassVar[bool] = False
    """Whether it reads ``request.cached``; prompts are hashed, at some cost, only if some strategy does."""

    def __init__(self, config: StrategySettings) -> None:
        self.config = config
        self.random = Random()
        self._turn = 0

    @contextmanager
    def same_turn(self) -> Iterator[None]:
        """Rank without taking a turn: endpoints that are equal come in the order of the next pick."""
        turn = self._turn
        try:
            yield
        finally:
            self._turn = turn

    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        """How bad ``endpoint`` would be for ``request``: the least wins. Any comparable value will do."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score() nor rank()")

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[Any]:
        """Return the score of each: written out where a thousand calls of :meth:`score` take too long."""
        return [self.score(endpoint, request) for endpoint in endpoints]

    def order(self, request: RequestContext, cost: float) -> float:
        """Place of a request among those that wait in the scheduler for prefill: the least goes first.

        ``cost`` is its predicted seconds of work. Shortest first gives the least mean wait; each second
        of waiting counts as ``AGEING`` seconds less work, so that nothing waits for ever.
        """
        return cost + AGEING * request.arrived

    def hopeless(self, request: RequestContext, cost: float) -> bool:
        """Whether a waiting request cannot be served in time any more, and lets all others pass."""
        return False

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return the ``count`` best of ``endpoints`` (never empty), best first.

        Equal scores take turns, so that an idle fleet is used evenly.
        """
        self._turn += 1
        scores, size = self.scores(endpoints, request), len(endpoints)
        turn = self._turn % size
        if count == 1:  # min() and index() are loops in C
            best = min(scores)
            try:
                return [endpoints[scores.index(best, turn)]]
            except ValueError:
                return [endpoints[scores.index(best)]]
        if isinstance(scores, list) and isinstance(scores[0], float):
            turned = [*scores[turn:], *scores[:turn]]
            return [endpoints[(at + turn) % size] for at in _least(turned, count)]
        order = heapq.nsmallest(count, (*range(turn, size), *range(turn)), key=scores.__getitem__)
        return [endpoints[i] for i in order]


def _least(scores: list[float], count: int) -> Iterator[int]:
    """Where the least ``count`` are: of 1,000 in a third of the time that ``nsmallest`` takes with a key."""
    at, before = -1, math.nan
    for score in heapq.nsmallest(count, scores):
        at = scores.index(score, at + 1 if score == before else 0)
        before = score
        yield at
