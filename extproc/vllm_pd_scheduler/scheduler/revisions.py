"""Which revision of a roll-out a request goes to: by weights, in turn; those of a session go together."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from hashlib import blake2b

MAX_SESSIONS = 1 << 16
"""Sessions whose revision is remembered: a choice, some 10 MB. For one that is forgotten it is chosen anew:
the same, as long as the weights are the same."""
_MAX_TURNS = 10_000
"""Sets of revisions that take turns apart from each other, by model and role. There are more only when many
models have come and gone; then all begin anew."""


class Turns:
    """Has revisions take turns, so that each gets its share of any number of requests, within one.

    A revision's next turn is due when so many requests have come that its share is one more than what it got.
    None has a turn before its share of all requests with this one is more than what it got, and of those the
    one that is due first has it. On one machine that is a schedule in which each job meets its deadline
    (Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", 1996).
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = tuple(weights)
        self._total = sum(weights)
        self._got = [0] * len(weights)
        self._requests = 0

    def next(self) -> int:
        """Return the number of the one whose turn it is."""
        self._requests += 1
        total, requests, got, weights = self._total, self._requests, self._got, self._weights
        may = (i for i, weight in enumerate(weights) if got[i] * total < requests * weight)
        chosen = min(may, key=lambda i: (got[i] + 1) / weights[i])
        got[chosen] += 1
        if requests == total:  # each has got just its weight
            self._requests, self._got = 0, [0] * len(weights)
        return chosen


class Revisions:
    """Chooses revisions by the weights that ``weights`` returns; without weights nobody asks it.

    Instances without a revision are those of the empty name. A revision that has no weight, or is not named,
    gets nothing.
    """

    def __init__(self, weights: Callable[[], Mapping[str, int]]) -> None:
        self._weights = weights
        self._turns: dict[Hashable, Turns] = {}
        self._sessions: OrderedDict[bytes, str] = OrderedDict()

    def may_get(self, revision: str | None) -> bool:
        """Whether requests may go to a revision."""
        weights = self._weights()
        return not weights or weights.get(revision or "", 0) > 0

    def choose(self, among: Sequence[str], session: str | None, turns_of: Hashable) -> str:
        """Return one of some revisions, all of which have a weight.

        What asks with the same ``turns_of`` takes turns. The requests of a session get the revision that the
        first of them got, as long as it is among these.
        """
        if len(among) == 1 and session is None:
            return among[0]
        if session is not None:
            return self._of_session(among, session)
        weights = self._weights()
        shares = tuple(weights[name] for name in among)
        key = turns_of, tuple(among), shares
        turns = self._turns.get(key)
        if turns is None:
            if len(self._turns) >= _MAX_TURNS:
                self._turns.clear()
            turns = self._turns[key] = Turns(shares)
        return among[turns.next()]

    def _of_session(self, among: Sequence[str], session: str) -> str:
        key = blake2b(session.encode(errors="surrogatepass"), digest_size=16).digest()
        found = self._sessions.get(key)
        if found not in among or found is None:
            found = self._sessions[key] = self._first_of_session(among, key)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return found

    def _first_of_session(self, among: Sequence[str], key: bytes) -> str:
        """Return the same for a session from each scheduler (rendezvous hashing, weighted)."""
        weights = self._weights()

        def distance(name: str) -> float:
            digest = blake2b(key + name.encode(errors="surrogatepass"), digest_size=8).digest()
            return -math.log((int.from_bytes(digest) + 0.5) / 2**64) / weights[name]

        return min(among, key=distance)
