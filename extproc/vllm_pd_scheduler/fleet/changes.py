"""The changes in who there is, or who can serve, and who is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..models import By


class Changes:
    """Calls listeners after each change in membership, address, health or draining. Part of the registry.

    The end of a drain is told by :meth:`.Registry.tell_drained`. ``refresh`` is called before the listeners.
    """

    def __init__(self, refresh: Callable[[], None]) -> None:
        self.by: str = By.START
        """Who caused the change of which the listeners are told."""
        self._refresh = refresh
        self._listeners: list[Callable[[], None]] = []
        self._number = 0
        """How many there were."""
        self._held_back = False
        """Whether the listeners are told later, of all changes at once."""

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after each change."""
        self._listeners.append(listener)

    def note(self, by: str | None = None) -> None:
        """Tell the listeners that something has changed; without ``by``, who caused the change before did."""
        self._number += 1
        if self._held_back:
            return
        if by is not None:
            self.by = by
        self._refresh()
        for listener in self._listeners:
            listener()

    @contextmanager
    def as_one(self, by: str) -> Iterator[None]:
        """Tell the listeners only at the end, once, of all changes that are made meanwhile."""
        if self._held_back:
            yield
            return
        self._held_back, number = True, self._number
        try:
            yield
        finally:
            self._held_back = False
            if self._number != number:
                self.note(by)
