"""Which pairs of P and D get no hand-offs now, for whatever reason."""

from __future__ import annotations

from collections.abc import Sequence

from .endpoint import Endpoint
from .pairs import Pairs
from .wrong_pairs import WrongPairs


class LeftOut:
    """The pairs whose hand-offs fail, and those that have given wrong texts."""

    def __init__(self, failing: Pairs, wrong: WrongPairs) -> None:
        self._failing = failing
        self._wrong = wrong

    def __bool__(self) -> bool:
        return bool(self._failing.in_doubt or self._wrong.why)

    @property
    def suspects(self) -> Sequence[Endpoint]:
        """The P of which some pair may be left out."""
        return tuple(dict.fromkeys((*self._failing.suspects, *self._wrong.prefill)))

    def barred(self, prefill: Endpoint, now: float) -> Sequence[Endpoint]:
        """Return the D that may not get what a P hands over now."""
        return (*self._failing.barred(prefill, now), *self._wrong.barred(prefill))

    def useless(self, prefill: Endpoint, partners: Sequence[Endpoint], now: float) -> bool:
        """Whether none of the ``partners``, the D that could take over from a P, may do so now."""
        if self._failing.useless(prefill, partners, now):
            return True
        return bool(partners) and frozenset(self.barred(prefill, now)).issuperset(partners)
