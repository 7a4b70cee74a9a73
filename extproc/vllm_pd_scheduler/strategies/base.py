"""The base class of strategies: a subclass writes ``score``, and ranking is done here."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import ne
from random import Random
from typing import Any, ClassVar, Protocol

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext

AGEING = 0.2
"""Seconds of work that a second of waiting makes up for in :meth:`Strategy.order`.

A choice between mean wait and the longest wait: with 0 the shortest prompt always goes first and a long one
may wait for ever, with a large value it is first come first served. With 0.2, a prompt of 10 s is overtaken
by short ones that arrive up to 50 s after it.
"""


def request_counts(endpoints: Sequence[Endpoint]) -> list[float]:
    """Return :attr:`Endpoint.requests` of each endpoint.

    It repeats that property's code: to call it for 1,000 endpoints would take half a millisecond.
    """
    return [endpoint.in_flight + endpoint.others_requests for endpoint in endpoints]


class StrategySettings(Protocol):
    """The part of the configuration that the built-in strategies read. A strategy gets all of it.

    It is a protocol because the room ``config`` imports the strategies, to check their names.
    """

    @property
    def load_weight(self) -> float:
        """Weight of the load in ``weighted``."""
        ...

    @property
    def kv_cache_weight(self) -> float:
        """Weight of the KV-cache use in ``weighted``."""
        ...

    @property
    def latency_weight(self) -> float:
        """Weight of the latency in ``weighted``."""
        ...


class Strategy:
    """Ranks the endpoints of one role for one request. Each role has an object of its own.

    A strategy of your own overrides :meth:`score`, or :meth:`rank` if it does not compare scores. Name it in
    the configuration by dotted path, ``"my_package.my_module:MyStrategy"``, or by an entry point in the
    group ``vllm_pd_scheduler.strategies``. It reads requests and endpoints: to set an attribute is an error.
    """

    reads_prefixes: ClassVar[bool] = False
    """Whether it reads ``request.cached``. Prompts are hashed, which has a cost, only if a strategy does."""

    last_scores: Sequence[Any] | None = None
    """The scores that the newest call of :meth:`rank` has compared, in the order of its endpoints.

    They are shown with the decision. A :meth:`rank` of your own may set it, to a new list each time.
    """

    def __init__(self, config: StrategySettings) -> None:
        self.config = config
        self.random = Random()
        self._turn = 0

    @contextmanager
    def same_turn(self) -> Iterator[None]:
        """Return a context in which ranking takes no turn: the next pick orders equal endpoints likewise."""
        turn = self._turn
        try:
            yield
        finally:
            self._turn = turn

    def accepts_sample(self, request: RequestContext) -> bool:
        """Whether :meth:`rank` may be offered some endpoints of a large fleet, drawn at random.

        Return ``True`` where the best of a sample is good enough: then the cost of a pick does not grow with
        the fleet. If the strategy reads ``request.cached``, endpoints with the longest cached prefixes are in
        the sample too. See :mod:`vllm_pd_scheduler.scheduler.candidates` for the sizes.
        """
        return False

    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        """Return how bad ``endpoint`` would be for ``request``, as any comparable value: the least wins.

        A NaN, which compares with nothing, counts as a failure of the strategy.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither score() nor rank()")

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[Any]:
        """Return the score of each endpoint.

        Override it in place of :meth:`score` if a call for each of 1,000 endpoints would take too long.
        """
        return [self.score(endpoint, request) for endpoint in endpoints]

    def terms(self, endpoint: Endpoint, request: RequestContext) -> dict[str, float]:
        """Return what an endpoint's score is made of, by name, to be shown with the decision.

        It is called after :meth:`rank` for the endpoint that was picked, for each request: it must be quick.
        """
        return {}

    def order(self, request: RequestContext, cost: float) -> float:
        """Return the place of a request among those that wait in the scheduler: the least goes first.

        ``cost`` is its predicted seconds of prefill. Order = cost + ``AGEING`` * time of arrival: shortest
        first, which gives the least mean wait, with ``AGEING`` seconds less work for each second of
        waiting, so that nothing waits for ever. (Time that passes for all alike changes no order, so the
        time of arrival stands for the wait.)
        """
        return cost + AGEING * request.arrived

    def hopeless(self, request: RequestContext, cost: float) -> bool:
        """Whether a waiting request cannot be served in time any more.

        Such a request waits until no other does; one with a priority below 0 is refused. ``cost`` is its
        predicted seconds of prefill.
        """
        return False

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return the ``count`` best of ``endpoints``, which is never empty, best first.

        A strategy of your own may return fewer, but one at least: ``least_load`` ranks the rest.
        Endpoints with equal scores take turns, so that an idle fleet is used evenly.
        """
        self._turn += 1
        scores, size = self.scores(endpoints, request), len(endpoints)
        self.last_scores = scores
        _check(scores, size)
        turn = self._turn % size
        if count == 1:  # min() and index() are loops in C
            best = min(scores)
            try:
                return [endpoints[scores.index(best, turn)]]
            except ValueError:
                return [endpoints[scores.index(best)]]
        if isinstance(scores, list) and isinstance(scores[0], float):
            turned = [*scores[turn:], *scores[:turn]]
            return [endpoints[(at + turn) % size] for at in _indices_of_least(turned, count)]
        order = heapq.nsmallest(count, (*range(turn, size), *range(turn)), key=scores.__getitem__)
        return [endpoints[i] for i in order]


def _check(scores: Sequence[Any], size: int) -> None:
    """Raise :exc:`ValueError` unless there are ``size`` scores that can be compared.

    A NaN is neither less nor more than any number: it would be the least, or hide it, by its place alone.
    """
    if len(scores) != size:
        raise ValueError(f"{len(scores)} scores for {size} endpoints")
    numbers = list(chain.from_iterable(scores)) if isinstance(scores[0], tuple) else scores
    if any(map(ne, numbers, numbers)):
        raise ValueError("a score is not a number (NaN)")


def _indices_of_least(scores: list[float], count: int) -> Iterator[int]:
    """Yield the indices of the ``count`` least scores, least first; equal ones in their order.

    With 1,000 scores it takes a third of the time of ``heapq.nsmallest`` with a key function.
    """
    at, before = -1, math.nan
    for score in heapq.nsmallest(count, scores):
        at = scores.index(score, at + 1 if score == before else 0)
        before = score
        yield at
