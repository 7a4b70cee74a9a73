"""Classes of the operator's own, by the name of an entry point or as a dotted path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class CannotLoad(ValueError):
    """The name stands for no class of that kind, or for one that cannot be imported."""


class Kind(Generic[T]):
    """Classes of one kind: subclasses of ``base``, which people call ``name``.

    ``built_in`` has ours by their names; other packages name theirs as entry points in ``group``.
    """

    def __init__(self, name: str, base: type[T], group: str, built_in: Mapping[str, type[T]]) -> None:
        self._name = name
        self._base = base
        self._group = group
        self._built_in = built_in

    def names(self) -> list[str]:
        """Return the names that :meth:`load` accepts besides dotted paths."""
        return [*self._built_in, *sorted(e.name for e in entry_points(group=self._group))]

    def load(self, name: str) -> type[T]:
        """Return a class by its built-in name, its entry point, or as ``package.module:Class``.

        Raise :exc:`CannotLoad`, which lists the known names or says what went wrong on import.
        """
        if name in self._built_in:
            return self._built_in[name]
        kind, loaded = self._name, None
        try:
            if ":" in name:
                loaded = _imported(name, kind)
            elif entries := entry_points(group=self._group, name=name):
                loaded = next(iter(entries)).load()
            else:
                names = ", ".join(self.names())
                raise CannotLoad(f"unknown {kind} {name!r}; choose one of {names}, or 'package.module:Class'")
        except CannotLoad:
            raise
        except Exception as error:  # an import runs other people's code, which may raise anything
            raise CannotLoad(f"{kind} {name!r} cannot be loaded: {_why(error, name, kind)}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, self._base)):
            public = self._base.__module__.rpartition(".")[0]
            raise CannotLoad(f"{name!r} is not a subclass of {public}.{self._base.__name__}")
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
