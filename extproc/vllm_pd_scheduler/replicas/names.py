"""The endpoints that a message names, in a list to which all else in it refers."""

from __future__ import annotations

from collections.abc import Callable

from ..fleet.endpoint import Endpoint
from .directory import Directory


class _Places(dict[Endpoint, int]):
    """The place of each endpoint in the list of a message, to which it is added when first asked for."""

    def __init__(self, names: list[int | str], directory: Directory) -> None:
        super().__init__()
        self._names, self._directory = names, directory

    def __missing__(self, endpoint: Endpoint) -> int:
        self._names.append(self._directory.name(endpoint))
        place = self[endpoint] = len(self._names) - 1
        return place


class Names:
    """The endpoints of a message, and the place of each in their list."""

    def __init__(self, directory: Directory) -> None:
        self.names: list[int | str] = []
        self.place: Callable[[Endpoint], int] = _Places(self.names, directory).__getitem__
        """Returns the place of an endpoint."""

    def add(self, name: int | str) -> int:
        """Add what stands for an endpoint, and return its place."""
        self.names.append(name)
        return len(self.names) - 1
