"""Classes of the operator's own, by the name of an entry point or as a dotted path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, TypeVar

T = TypeVar("T")


class CannotLoad(ValueError):
    """The name stands for no class of that kind, or for one that cannot be imported."""


def load_class(
    name: str, group: str, base: type[T], kind: str, known: Callable[[], Sequence[str]]
) -> type[T]:
    """Return a subclass of ``base`` by its entry point in ``group``, or as ``package.module:Class``.

    ``kind`` is what it is called, ``known`` returns the names that there are. Raise :exc:`CannotLoad`, which
    lists these or says what went wrong on import.
    """
    loaded: Any
    try:
        if ":" in name:
            loaded = _imported(name, kind)
        elif entries := entry_points(group=group, name=name):
            loaded = next(iter(entries)).load()
        else:
            names = ", ".join(known())
            raise CannotLoad(f"unknown {kind} {name!r}; choose one of {names}, or 'package.module:Class'")
    except CannotLoad:
        raise
    except Exception as error:  # an import runs other people's code, which may raise anything
        raise CannotLoad(f"{kind} {name!r} cannot be loaded: {_why(error, name, kind)}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        public = base.__module__.rpartition(".")[0]
        raise CannotLoad(f"{name!r} is not a subclass of {public}.{base.__name__}")
    return loaded


def _imported(name: str, kind: str) -> Any:
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    try:
        return getattr(found, attribute)
    except AttributeError:
        file = getattr(found, "__file__", module)
        raise CannotLoad(f"{kind} {name!r} cannot be loaded: {file} defines no {attribute!r}") from None


def _why(error: Exception, name: str, kind: str) -> str:
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
    return f"{text}, which it imports. `{sys.executable} -m pip install …` installs what a {kind} needs"
