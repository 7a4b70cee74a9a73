"""Strategies by name: built-in ones, entry points of other packages, and dotted paths."""

from __future__ import annotations

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from ..system.loading import CannotLoad, Kind
from ..telemetry.failures import why_not_made
from .base import Strategy, StrategySettings
from .least_load import LeastLoad
from .power_of_two import PowerOfTwo
from .predicted_latency import PredictedLatency
from .prefix_cache import PrefixCache
from .round_robin import RoundRobin
from .session import Session
from .slo import Slo
from .weighted import Weighted

__all__ = [
    "ENTRY_POINT_GROUP", "Endpoint", "RequestContext", "Strategy", "StrategySettings", "UnknownStrategy",
    "load_strategy", "make_strategy", "strategy_names",
]  # fmt: skip

ENTRY_POINT_GROUP = "vllm_pd_scheduler.strategies"
"""Group of entry points in which other packages name their strategies."""

_BUILT_IN: dict[str, type[Strategy]] = {
    "round_robin": RoundRobin,
    "least_load": LeastLoad,
    "weighted": Weighted,
    "power_of_two": PowerOfTwo,
    "prefix_cache": PrefixCache,
    "session": Session,
    "predicted_latency": PredictedLatency,
    "slo": Slo,
}


class UnknownStrategy(ValueError):
    """The name stands for no strategy, or for one that cannot be imported or constructed."""


_KIND = Kind("strategy", Strategy, ENTRY_POINT_GROUP, _BUILT_IN)


def strategy_names() -> list[str]:
    """Return the names that :func:`load_strategy` accepts besides dotted paths."""
    return _KIND.names()


def load_strategy(name: str) -> type[Strategy]:
    """Return a strategy class by its built-in name, its entry point or as ``package.module:Class``.

    Raise :exc:`UnknownStrategy`, which lists the known names or says what went wrong on import.
    """
    try:
        return _KIND.load(name)
    except CannotLoad as error:
        raise UnknownStrategy(str(error)) from error.__cause__


def make_strategy(name: str, config: StrategySettings) -> Strategy:
    """Return a new strategy object; raise :exc:`UnknownStrategy`, also if the constructor fails."""
    strategy = load_strategy(name)
    try:
        return strategy(config)
    except Exception as error:  # other people's code, as on import
        raise UnknownStrategy(f"strategy {name!r} cannot be made: {why_not_made(strategy, error)}") from error
