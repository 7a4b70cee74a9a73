"""Strategies by name: built-in ones, entry points of other packages, and dotted paths."""

from __future__ import annotations

import importlib
import os
import sys
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


def strategy_names() -> list[str]:
    """Return the names that :func:`load_strategy` accepts besides dotted paths."""
    return [*_BUILT_IN, *sorted(e.name for e in entry_points(group=ENTRY_POINT_GROUP))]


def load_strategy(name: str) -> type[Strategy]:
    """Return a strategy class by its built-in name, its entry point or as ``package.module:Class``.

    Raise :exc:`UnknownStrategy`, which lists the known names or says what went wrong on import.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    loaded: Any
    try:
        if ":" in name:
            loaded = _imported(*name.split(":", 1))
        elif entries := entry_points(group=ENTRY_POINT_GROUP, name=name):
            loaded = next(iter(entries)).load()
        else:
            known = ", ".join(strategy_names())
            raise UnknownStrategy(
                f"unknown strategy {name!r}; choose one of {known}, or 'package.module:Class'"
            )
    except UnknownStrategy:
        raise
    except Exception as error:  # an import runs other people's code, which may raise anything
        raise UnknownStrategy(f"strategy {name!r} cannot be loaded: {_why(error, name)}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Strategy)):
        raise UnknownStrategy(f"{name!r} is not a subclass of vllm_pd_scheduler.strategies.Strategy")
    return loaded


def _imported(module: str, attribute: str) -> Any:
    found = importlib.import_module(module)
    try:
        return getattr(found, attribute)
    except AttributeError:
        name, file = f"{module}:{attribute}", getattr(found, "__file__", module)
        raise UnknownStrategy(
            f"strategy {name!r} cannot be loaded: {file} defines no {attribute!r}"
        ) from None


def _why(error: Exception, name: str) -> str:
    """Return what went wrong on import, and what to do if there is no such module."""
    text = str(error) or type(error).__name__
    module = name.partition(":")[0]
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"
    if f"{module}.".startswith(f"{error.name}."):
        tried = os.pathsep.join(path for path in sys.path if path)
        return (
            f"{text}. Start with PYTHONPATH set to the directory that {error.name} is in, "
            f"or install its package: `{sys.executable} -m pip install …`. Python has looked in {tried}"
        )
    return f"{text}, which it imports. `{sys.executable} -m pip install …` installs what a strategy needs"


def make_strategy(name: str, config: StrategySettings) -> Strategy:
    """Return a new strategy object; raise :exc:`UnknownStrategy`, also if the constructor fails."""
    strategy = load_strategy(name)
    try:
        return strategy(config)
    except Exception as error:  # other people's code, as on import
        raise UnknownStrategy(f"strategy {name!r} cannot be made: {error}") from error
