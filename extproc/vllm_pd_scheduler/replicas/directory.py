"""How messages name endpoints: by numbers of four bytes, which every replica works out of their ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry


@lru_cache(4096)
def number_of(name: str) -> int:
    """Return the number that stands for an endpoint's id."""
    return int.from_bytes(blake2b(name.encode(errors="replace"), digest_size=4).digest(), "big")


class Directory:
    """The endpoints of a registry by number. Two with the same number, if there are any, go by their ids."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._by_number: dict[int, Endpoint | None] = {}
        self._version = -1

    def name(self, endpoint: Endpoint) -> int | str:
        """Return what stands for an endpoint in a message."""
        number = number_of(endpoint.id)
        if self._by_number.get(number) is not endpoint:
            self._read_again()
            if self._by_number.get(number) is not endpoint:
                return endpoint.id
        return number

    def find(self, name: int | str) -> Endpoint | None:
        """Return the endpoint of a name; ``None`` if this replica does not know it, yet or any more."""
        if isinstance(name, str):
            return self._registry.find(name)
        found = self._by_number.get(name)
        if found is None or found not in self._registry:
            self._read_again()
            found = self._by_number.get(name)
        return found

    def find_all(self, names: Sequence[int | str]) -> list[Endpoint | None]:
        """Return the endpoint of each name, as :meth:`find` does."""
        if self._version == self._registry.models.version:  # so all that are known are still there
            found = list(map(self._by_number.get, names))  # type: ignore[arg-type]
            if None not in found:
                return found
        return [self.find(each) for each in names]

    def _read_again(self) -> None:
        if self._version == self._registry.models.version:
            return
        self._version, self._by_number = self._registry.models.version, {}
        for endpoint in self._registry:
            number = number_of(endpoint.id)
            self._by_number[number] = None if number in self._by_number else endpoint
