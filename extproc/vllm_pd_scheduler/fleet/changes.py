"""The changes in who there is, or who can serve, and who is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..models import By
from .endpoint import Endpoint


class Changes:
    """Calls listeners after each change in membership, address, health or draining. Part of the registry.

    The end of a drain is told by :meth:`.Registry.tell_drained`. ``refresh`` is called before the listeners,
    with who has changed, and returns who has by that.
    """

    def __init__(self, refresh: Callable[[Endpoint | None], Endpoint | None]) -> None:
        self.by: str = By.START
        """Who caused the change of which the listeners are told."""
        self.of: Endpoint | None = None
        """Who has changed, with the other ranks of its instance, and nobody else; ``None``: all may have.

        It is not in the registry if it was removed.
        """
        self._refresh = refresh
        self._listeners: list[Callable[[], None]] = []
        self._number = 0
        """How many there were."""
        self._all_told = True
        """Whether each listener was told of each change."""
        self._held_back = False
        """Whether the listeners are told later, of all changes at once."""

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after each change."""
        self._listeners.append(listener)

    def note(self, by: str | None = None, of: Endpoint | None = None) -> None:
        """Tell the listeners that something has changed; without ``by``, who caused the change before did.

        Without ``of``, everything may have.
        """
        self._number += 1
        if self._all_told or self.of is of:
            self.of = of
        else:
            self.of = None
        self._all_told = False
        if not self._held_back:
            self._tell(by)

    def _tell(self, by: str | None) -> None:
        """Tell the listeners. One that changes something has all of them told of both."""
        if by is not None:
            self.by = by
        self.of = self._refresh(self.of)
        for listener in self._listeners:
            listener()
        self._all_told = True

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
                self._tell(by)
