"""Strategies by name: the built-in ones, entry points, and dotted paths."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
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
    """No strategy has this name, or what it names is not one, or cannot be made."""


def strategy_names() -> list[str]:
    """Names that :func:`load_strategy` knows without a dotted path."""
    return [*_BUILT_IN, *sorted(e.name for e in entry_points(group=ENTRY_POINT_GROUP))]


def load_strategy(name: str) -> type[Strategy]:
    """Return the strategy class: a built-in name, an entry point's, or ``package.module:Class``.

    Raises :exc:`UnknownStrategy`, with what there is or what went wrong on import.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    found: Any
    try:
        if ":" in name:
            module, _, attribute = name.partition(":")
            found = getattr(importlib.import_module(module), attribute)
        elif entries := entry_points(group=ENTRY_POINT_GROUP, name=name):
            found = next(iter(entries)).load()
        else:
            known = ", ".join(strategy_names())
            raise UnknownStrategy(
                f"unknown strategy {name!r}; choose one of {known}, or 'package.module:Class'"
            )
    except UnknownStrategy:
        raise
    except Exception as error:  # an import runs someone else's code: whatever it raises is the answer
        raise UnknownStrategy(f"strategy {name!r} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise UnknownStrategy(f"{name!r} is not a subclass of vllm_pd_scheduler.strategies.Strategy")
    return found


def make_strategy(name: str, config: StrategySettings) -> Strategy:
    """Return a new strategy object; raises :exc:`UnknownStrategy`, also if its constructor fails."""
    found = load_strategy(name)
    try:
        return found(config)
    except Exception as error:  # someone else's code, as on import
        raise UnknownStrategy(f"strategy {name!r} cannot be made: {error}") from error
