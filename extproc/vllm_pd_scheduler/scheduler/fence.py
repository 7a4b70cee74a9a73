"""Keeps what a strategy raises, or returns by mistake, from those who ask it.

A strategy may be code of the operator's. An error in it must not fail requests, nor stop a drain, the queue
or the updates to Envoy: a default answers in its place, and the failure is counted and logged.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

from ..fleet.endpoint import Endpoint
from ..records.decision import NO_SCORES
from ..request.context import RequestContext
from ..strategies import Strategy
from .candidates import Offer

T = TypeVar("T")

Explained = tuple["array[float]", dict[str, float]]
"""The scores of all that were offered, if they are numbers, and the terms of the one that was taken."""
_MAX_TERMS = 16
"""Of one endpoint, that are kept."""


class StrategyFence:
    """A strategy whose calls raise no :exc:`Exception`: ``failed`` is told, and a default is returned.

    What is no :exc:`Exception` (:exc:`KeyboardInterrupt`, a cancelled task) passes.
    """

    def __init__(self, strategy: Strategy, failed: Callable[[Exception], None]) -> None:
        self.strategy = strategy
        self._has_terms = type(strategy).terms is not Strategy.terms
        self._failed = failed

    def seed(self, seed: int) -> None:
        """Make its choices at random repeatable."""
        self._ask(lambda: self.strategy.random.seed(seed), None)

    @property
    def reads_prefixes(self) -> bool:
        """See :attr:`Strategy.reads_prefixes`; ``False`` if it fails."""
        try:
            return bool(self.strategy.reads_prefixes)
        except Exception as error:  # someone else's code, which may raise anything
            self._failed(error)
            return False

    def accepts_sample(self, request: RequestContext) -> bool:
        """See :meth:`Strategy.accepts_sample`; ``False`` if it fails."""
        return self._ask(lambda: bool(self.strategy.accepts_sample(request)), False)

    def rank(self, offer: Offer, request: RequestContext, count: int) -> list[Endpoint] | None:
        """See :meth:`Strategy.rank`; ``None`` if it fails, or returns anything but 1 to ``count`` of these.

        The result is empty if the strategy returns only endpoints that are excluded.
        """
        try:
            return self._rank(offer, request, count)
        except Exception as error:  # someone else's code, which may raise anything
            self._failed(error)
            return None

    def _rank(self, offer: Offer, request: RequestContext, count: int) -> list[Endpoint]:
        self.strategy.last_scores = None
        most = count + len(offer.exclude)
        chosen = list(islice(self.strategy.rank(offer.endpoints, request, most), most + 1))
        if not chosen:
            raise ValueError("rank() returned nothing")
        if len(chosen) > most:
            raise ValueError(f"rank() returned more than {most}")
        for each in chosen:
            if each not in offer.endpoints:
                what = each.id if isinstance(each, Endpoint) else f"a {type(each).__name__}"
                raise ValueError(f"rank() returned {what}, which it was not offered")
        if len(set(chosen)) < len(chosen):
            raise ValueError("rank() returned an endpoint twice")
        return [e for e in chosen if e not in offer.exclude][:count] if offer.exclude else chosen

    def explained(self, number: int, picked: Endpoint, request: RequestContext) -> Explained:
        """Return what the newest ranking, of ``number`` endpoints, has compared; nothing if that fails."""
        try:
            compared = self.strategy.last_scores
            scores = NO_SCORES if compared is None else _packed(compared, number)
            return scores, _few(self.strategy.terms(picked, request)) if self._has_terms else {}
        except Exception as error:  # someone else's code, which may raise anything
            self._failed(error)
            return NO_SCORES, {}

    def order(self, request: RequestContext, cost: float) -> float:
        """See :meth:`Strategy.order`; the base class's if it fails, or is no number."""
        default = Strategy.order(self.strategy, request, cost)
        return self._ask(lambda: _number(self.strategy.order(request, cost)), default)

    def hopeless(self, request: RequestContext, cost: float) -> bool:
        """See :meth:`Strategy.hopeless`; ``False`` if it fails."""
        return self._ask(lambda: bool(self.strategy.hopeless(request, cost)), False)

    @contextmanager
    def same_turn(self) -> Iterator[None]:
        """See :meth:`Strategy.same_turn`."""
        context = self._ask(lambda: _entered(self.strategy.same_turn()), None)
        try:
            yield
        finally:
            if context is not None:
                self._ask(lambda: context.__exit__(None, None, None), None)

    def _ask(self, ask: Callable[[], T], default: T) -> T:
        try:
            return ask()
        except Exception as error:  # someone else's code, which may raise anything
            self._failed(error)
            return default


def _packed(scores: Any, number: int) -> array[float]:
    """Return scores, or their parts one after another, as plain numbers; nothing if they are none."""
    if type(scores) is not list or len(scores) != number:
        return NO_SCORES
    try:
        packed = array("d", [*chain.from_iterable(scores)] if type(scores[0]) is tuple else scores)
    except (TypeError, OverflowError):
        return NO_SCORES
    return NO_SCORES if len(packed) % number else packed


def _few(terms: dict[str, float]) -> dict[str, float]:
    """Return terms that may be kept: a copy of not too many."""
    if len(terms) > _MAX_TERMS:
        raise ValueError(f"terms() returned {len(terms)}: at most {_MAX_TERMS} are kept")
    return dict(terms)


def _number(order: float) -> float:
    number = float(order)
    if number != number:
        raise ValueError("order() returned NaN")  # the queue would not find the request again
    return number


def _entered(context: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    context.__enter__()
    return context
