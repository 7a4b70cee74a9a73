"""Objects whose attributes only their own methods set."""

from __future__ import annotations

from typing import NoReturn

set_own = object.__setattr__
"""Sets an attribute of a :class:`ReadOnly`: for its own methods."""


class ReadOnly:
    """Strategies, which may be code of the operator's, read it; to set an attribute is an error.

    Reading costs what it always does. A property for each attribute would take a pick three times as long.
    """

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__}.{name} is read-only")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__}.{name} is read-only")
