"""Which of several schedulers keeps an instance that they have chosen at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from hashlib import blake2b

from .endpoint import Endpoint
from .reservation import Reservation

HEARD_S = 0.012
"""Seconds after which a scheduler knows what the others chose when it chose: they tell it at once, or within
10 ms where much happens, and some are for the way. A choice: what takes longer is found too late."""
_RECENT = 0.05
"""Weight of the newest claim in the mean loss: some 20 count."""
_MOST_LOSS_S = 1.0
"""That one claim counts for, so that one long prompt does not decide for long."""
_MAX_WATCHED = 256
_MAX_KNOWN = 10_000


class Claims:
    """Finds out whether a choice of ours stands. Part of the registry; alone, every choice does.

    Schedulers that choose within one sync delay choose blindly, and all of them the P that seems to be the
    best: in a burst, each gives it a request. So at each P they have an order, which all find alike without
    asking. Who comes first there sends its request at once. Another one's choice is a claim for ``HEARD_S``:
    it is told, and counted, and then stands unless one who comes before it has claimed the same P meanwhile.
    If so, its request is given a P again, now with all known.

    To wait costs nothing where the request would wait for P anyway. At an idle P it costs ``HEARD_S``, which
    is spent only while it is less than what requests lose on average by not waiting.
    """

    def __init__(self) -> None:
        self._name = ""
        self._others: tuple[str, ...] = ()
        self._first: dict[str, bool] = {}
        """By endpoint, whether we come first there."""
        self._watched: deque[Reservation] = deque(maxlen=_MAX_WATCHED)
        """Claims of ours on idle P, until it is known what they have lost."""
        self._loss = 0.0
        """Mean seconds of others' work that came before a request that did not wait for it."""

    def among(self, name: str, others: Collection[str]) -> None:
        """Note what this scheduler is called, and which others there are."""
        self._name, self._others, self._first = name, tuple(others), {}

    @property
    def lead(self) -> float:
        """Seconds before P is free in which it is to be claimed, to be given to one when it is."""
        return HEARD_S if self._others else 0.0

    def contested(self, endpoint: Endpoint, now: float) -> bool:
        """Whether a P, if it is chosen now, should only be claimed."""
        if not self._others:
            return False
        self._learn(now)
        if self._is_first(endpoint):
            return False
        # Half of it: it may well be over early.
        return self._loss >= HEARD_S - endpoint.prefill.remaining(now) / 2

    def made(self, claim: Reservation) -> None:
        """Note a choice of ours, claimed or not, to see what it loses."""
        if self._others and _idle(claim.wait) and not self._is_first(claim.endpoint):
            self._watched.append(claim)

    def overtaken(self, claim: Reservation) -> bool:
        """Whether another scheduler that comes before us has claimed the same P since."""
        return self._before(claim) > 0.0

    def _learn(self, now: float) -> None:
        while self._watched and self._watched[0].at <= now - HEARD_S:
            lost = min(_MOST_LOSS_S, self._before(self._watched.popleft()))
            self._loss += _RECENT * (lost - self._loss)

    def _before(self, claim: Reservation) -> float:
        """Return the predicted seconds of the prefills that others, who come before us, have sent since."""
        endpoint, lost = claim.endpoint, 0.0
        for other in reversed(list(endpoint.prefill.pending)):
            if not isinstance(other, Reservation):
                continue
            if other.at < claim.at:
                break
            at_once = other.at <= claim.at + HEARD_S
            if at_once and other.replica and self._precedes(other.replica, endpoint):
                lost += other.cost
        return lost

    def _is_first(self, endpoint: Endpoint) -> bool:
        first = self._first.get(endpoint.id)
        if first is None:
            if len(self._first) >= _MAX_KNOWN:  # of most of them the instance is gone
                self._first.clear()
            first = not any(self._precedes(each, endpoint) for each in self._others)
            self._first[endpoint.id] = first
        return first

    def _precedes(self, other: str, endpoint: Endpoint) -> bool:
        return _place(other, endpoint) < _place(self._name, endpoint)


def _place(replica: str, endpoint: Endpoint) -> bytes:
    """Return the place of a scheduler at an endpoint: a hash of both, so each is first at its share."""
    return blake2b(f"{replica} {endpoint.id}".encode(), digest_size=8).digest()


def _idle(wait: float) -> bool:
    """Whether a request that must wait so long for P would notice that it is sent ``HEARD_S`` later."""
    return wait < 2 * HEARD_S
