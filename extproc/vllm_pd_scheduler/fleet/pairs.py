"""Which P and D cannot hand over to each other, though each of them does with others.

A firewall between two hosts, another fabric or another version makes every hand-off of one pair fail. So a D
that fails a request with a hand-off is first a doubt about the pair. The pair is to blame if D has served
another request since, with a hand-off of another P or with none. D is if it has not, or has failed others
too. P is if all that it hands over has failed, at several D that serve others.

A pair is one of processes: the ranks of one have the same network, version and settings.

Only what is unusual is kept: nothing of the pairs whose requests succeed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .breaker import Breaker, BreakerPolicy, BreakerState
from .endpoint import Endpoint
from .reservation import Reservation

MAX_DOUBTS = 4096
"""Pairs in doubt that are kept: of a thousand P and a thousand D, a million could be."""


class PairChange(NamedTuple):
    """Hand-offs of a P to a D (``None``: to any) are left out, or are not any more."""

    prefill: Endpoint
    decode: Endpoint | None
    out: bool
    pause: float
    """Seconds until the next is tried, if they are left out."""


@dataclass(slots=True)
class Doubt:
    """What fails between a P and a D, or of all that a P hands over."""

    breaker: Breaker
    works_else: bool = False
    """Whether D has answered all the same when a hand-off of the pair has failed."""
    served_before: int = 0
    """Requests that D had served before the pair's first failure, or has served with its hand-offs since."""
    trial: Reservation | None = None
    """The request that is to show whether it works again."""
    failed_at: Counter[Endpoint] = field(default_factory=Counter)
    """D at which hand-offs have failed in a row, of a doubt about a P."""

    def bars(self, now: float) -> bool:
        """Whether no hand-off may be tried: it is left out, and its pause is not over or a trial runs."""
        self.breaker.probed(now)
        if self.breaker.state is BreakerState.HALF_OPEN:
            return self.trial is not None and self.trial.active
        return self.breaker.state is BreakerState.OPEN

    def tried(self, reservation: Reservation) -> None:
        """Note a request that is on its way; on trial, the first one decides."""
        if self.breaker.state is BreakerState.HALF_OPEN and (self.trial is None or not self.trial.active):
            self.trial = reservation


class Pairs:
    """The pairs that are in doubt, and those that are left out. Part of the registry.

    ``ranks_of`` returns all endpoints of an endpoint's process. The first of them stands for it here, and in
    all that is returned but where it says otherwise. Whatever is recorded is of instances that are there.
    """

    def __init__(
        self, policy: BreakerPolicy, ranks_of: Callable[[Endpoint], Sequence[Endpoint]] = lambda one: (one,)
    ) -> None:
        self.on_change: Callable[[PairChange], None] | None = None
        self.on_verdict: Callable[[PairChange], None] | None = None
        """Called with the changes that requests of ours have made, not those of another replica."""
        self._policy = policy
        self._ranks_of = ranks_of
        self._doubts: dict[Endpoint, dict[Endpoint, Doubt]] = {}
        """By P and D."""
        self._of_prefill: dict[Endpoint, Doubt] = {}
        self._failed_with: dict[Endpoint, set[Endpoint | None]] = {}
        """For each D, the P whose hand-offs have failed there in a row; ``None`` is a request without one."""
        self._served: dict[Endpoint, int] = {}
        """For each D that was ever in doubt, the requests that it has served since."""
        self.in_doubt: dict[Endpoint, None] = {}
        """P of which something is left out or on trial. Without any, no request need ask."""

    def follow(self, policy: BreakerPolicy) -> None:
        """Use another policy from now on."""
        self._policy = policy
        for doubt in (*self._of_prefill.values(), *(each for _, _, each in self._all())):
            doubt.breaker.follow(policy)

    @property
    def suspects(self) -> Sequence[Endpoint]:
        """The P of pairs that are left out or on trial, all of their ranks."""
        return tuple(rank for prefill in self.in_doubt for rank in self._ranks_of(prefill))

    def out(self) -> Iterator[tuple[Endpoint, Endpoint | None, Doubt]]:
        """Yield P, D and doubt of what is left out; D is ``None`` where all of a P's is."""
        for prefill, doubt in self._of_prefill.items():
            if doubt.breaker.state is not BreakerState.CLOSED:
                yield prefill, None, doubt
        yield from (each for each in self._all() if each[2].breaker.state is not BreakerState.CLOSED)

    def barred(self, prefill: Endpoint, now: float) -> Sequence[Endpoint]:
        """Return the D that may not get what a P hands over now, all of their ranks."""
        doubts = self._doubts.get(self._first(prefill))
        if not doubts:
            return ()
        return [rank for d, doubt in doubts.items() if doubt.bars(now) for rank in self._ranks_of(d)]

    def useless(self, prefill: Endpoint, partners: Sequence[Endpoint], now: float) -> bool:
        """Whether none of the ``partners``, the D that could take over from a P, may do so now."""
        doubt = self._of_prefill.get(self._first(prefill))
        if doubt is None:
            return False
        if doubt.bars(now):
            return True
        barred = frozenset(self.barred(prefill, now))
        return 0 < len(partners) <= len(barred) and barred.issuperset(partners)

    def tried(self, prefill: Endpoint, decode: Endpoint | None, reservation: Reservation) -> None:
        """Note a request on its way to a P or, with what that has handed over, to a D."""
        prefill = self._first(prefill)
        doubt = self._of_prefill.get(prefill)
        if doubt is not None:
            doubt.tried(reservation)
        doubt = self._doubts.get(prefill, {}).get(self._first(decode)) if decode is not None else None
        if doubt is not None:
            doubt.tried(reservation)

    def on_trial(self, prefill: Endpoint, decode: Endpoint) -> bool:
        """Whether a pair was left out until now, and the next hand-off decides."""
        prefill = self._first(prefill)
        doubt = self._doubts.get(prefill, {}).get(self._first(decode)) or self._of_prefill.get(prefill)
        return doubt is not None and doubt.breaker.state is BreakerState.HALF_OPEN

    def failed(self, prefill: Endpoint | None, decode: Endpoint, now: float, *, served: bool = False) -> None:
        """Record that a D has failed a request with the hand-off of a P, or one without.

        ``served``: D has answered it all the same; only the hand-off has failed.
        """
        decode, prefill = self._first(decode), prefill and self._first(prefill)
        if not served:
            self._failed_with.setdefault(decode, set()).add(prefill)
        if prefill is None:
            return
        whole = self._of_prefill.setdefault(prefill, Doubt(Breaker(self._policy)))
        whole.failed_at[decode] += 1
        broken = whole.breaker.failed()
        doubt = self._doubt(prefill, decode)
        if doubt is not None:
            doubt.works_else = doubt.works_else or served
            closed = doubt.breaker.state is not BreakerState.OPEN
            if doubt.breaker.failed() and self._works_else(decode, doubt) and closed:
                self._open(prefill, decode, doubt, now)
        if broken and (whole.breaker.state is BreakerState.HALF_OPEN or self._is_at_fault(prefill, whole)):
            self._open(prefill, None, whole, now)

    def leave_out_elsewhere(self, prefill: Endpoint, decode: Endpoint | None, now: float) -> None:
        """Leave out a pair, or all of a P, with which requests of another replica have failed."""
        prefill, decode = self._first(prefill), decode and self._first(decode)
        whole = self._of_prefill.setdefault(prefill, Doubt(Breaker(self._policy)))
        doubt = whole if decode is None else self._doubt(prefill, decode)
        if doubt is not None and doubt.breaker.state is not BreakerState.OPEN:
            self._open(prefill, decode, doubt, now, ours=False)

    def take_back_elsewhere(self, prefill: Endpoint, decode: Endpoint | None) -> None:
        """Use a pair again, or a P, with which a trial request of another replica has gone well."""
        prefill, decode = self._first(prefill), decode and self._first(decode)
        doubts = self._doubts.get(prefill, {})
        doubt = self._of_prefill.get(prefill) if decode is None else doubts.get(decode)
        if doubt is None or doubt.breaker.state is BreakerState.CLOSED:
            return
        doubt.breaker.readmit()
        doubt.breaker.succeeded()
        self._tell(PairChange(prefill, decode, False, 0.0), ours=False)
        if decode is not None and doubt.breaker.spotless:
            del doubts[decode]
        self._clear(prefill)

    def is_out(self, prefill: Endpoint, decode: Endpoint | None) -> bool:
        """Whether a pair, or all of a P, is left out or on trial."""
        prefill, decode = self._first(prefill), decode and self._first(decode)
        of_pair = self._doubts.get(prefill, {})
        doubt = self._of_prefill.get(prefill) if decode is None else of_pair.get(decode)
        return doubt is not None and doubt.breaker.state is not BreakerState.CLOSED

    def explain(self, decode: Endpoint) -> bool:
        """Whether a P, and not D, is to blame for all requests that D has failed in a row."""
        decode = self._first(decode)
        failed = self._failed_with.get(decode, ())
        if len(failed) != 1:
            return False
        [prefill] = failed
        doubt = None if prefill is None else self._doubts.get(prefill, {}).get(decode)
        whole = None if prefill is None else self._of_prefill.get(prefill)
        at_fault = whole is not None and whole.breaker.state is BreakerState.OPEN
        return at_fault or (doubt is not None and self._works_else(decode, doubt))

    def forgive(self, prefill: Endpoint, decode: Endpoint) -> None:
        """Take back the newest failure of a D with the hand-off of a P: it was the request's."""
        prefill, decode = self._first(prefill), self._first(decode)
        whole, doubt = self._of_prefill.get(prefill), self._doubts.get(prefill, {}).get(decode)
        if whole is not None and (decode in whole.failed_at or whole.breaker.state is BreakerState.OPEN):
            whole.failed_at -= Counter((decode,))
            whole.breaker.forgive()
        if doubt is not None:
            doubt.breaker.forgive()
            if not doubt.breaker.failures:
                self._failed_with.get(decode, set()).discard(prefill)
            if doubt.breaker.spotless:
                del self._doubts[prefill][decode]
        self._clear(prefill)

    def served(self, prefill: Endpoint | None, decode: Endpoint) -> None:
        """Record that a D has served a request with the hand-off of a P, used or not, or with none."""
        if not (self._failed_with or self._served):  # no D has failed anything
            return
        decode, prefill = self._first(decode), prefill and self._first(prefill)
        self._failed_with.pop(decode, None)
        if decode in self._served:
            self._served[decode] += 1
            if prefill is not None and (doubt := self._doubts.get(prefill, {}).get(decode)) is not None:
                doubt.served_before += 1

    def succeeded(self, prefill: Endpoint, decode: Endpoint) -> None:
        """Record that the hand-off of a P has come to a D."""
        if not self._of_prefill:  # none of any P has failed
            return
        prefill, decode = self._first(prefill), self._first(decode)
        whole = self._of_prefill.get(prefill)
        if whole is None:
            return
        whole.failed_at.clear()
        if whole.breaker.succeeded():
            self._tell(PairChange(prefill, None, False, 0.0))
        doubt = self._doubts.get(prefill, {}).get(decode)
        if doubt is not None:
            if doubt.breaker.succeeded():
                self._tell(PairChange(prefill, decode, False, 0.0))
            if doubt.breaker.spotless:
                del self._doubts[prefill][decode]
        self._clear(prefill)

    def ejected(self, decode: Endpoint) -> None:
        """Note that a D is out itself: for what has failed with several, no pair is to blame."""
        decode = self._first(decode)
        if len(self._failed_with.pop(decode, ())) > 1:
            self.forget(decode)

    def forget(self, endpoint: Endpoint) -> None:
        """Forget all of an instance: it is gone, or it is another process."""
        for known in (self._failed_with, self._served, self._doubts, self._of_prefill, self.in_doubt):
            known.pop(endpoint, None)
        for decode in [each for each, failed in self._failed_with.items() if endpoint in failed]:
            self._failed_with[decode].discard(endpoint)
            if not self._failed_with[decode]:
                del self._failed_with[decode]
        for prefill in [each for each, doubts in self._doubts.items() if endpoint in doubts]:
            del self._doubts[prefill][endpoint]
        for prefill, doubt in list(self._of_prefill.items()):
            doubt.failed_at.pop(endpoint, None)
            self._clear(prefill)

    def _first(self, endpoint: Endpoint) -> Endpoint:
        """Return the one that stands for an endpoint's process."""
        return endpoint if endpoint.rank is None else self._ranks_of(endpoint)[0]

    def _works_else(self, decode: Endpoint, doubt: Doubt) -> bool:
        """Whether D has served another request since the first failure of the pair in doubt."""
        return doubt.works_else or self._served[decode] > doubt.served_before

    def _is_at_fault(self, prefill: Endpoint, whole: Doubt) -> bool:
        """Whether what a P hands over has failed at several D, which serve others and fail nothing else."""
        if whole.breaker.state is BreakerState.OPEN or len(whole.failed_at) < 2:
            return False
        doubts = self._doubts.get(prefill, {})
        return all(
            self._failed_with.get(each, {prefill}) == {prefill}
            and each in doubts
            and self._works_else(each, doubts[each])
            for each in whole.failed_at
        )

    def _open(
        self, prefill: Endpoint, decode: Endpoint | None, doubt: Doubt, now: float, *, ours: bool = True
    ) -> None:
        doubt.breaker.open(now)
        doubt.trial = None
        self.in_doubt[prefill] = None
        if decode is None:
            doubt.failed_at.clear()
            self._doubts.pop(prefill, None)
        self._tell(PairChange(prefill, decode, True, doubt.breaker.not_before - now), ours=ours)

    def _doubt(self, prefill: Endpoint, decode: Endpoint) -> Doubt | None:
        """Return the doubt about a pair, a new one if there is room for it."""
        doubts = self._doubts.setdefault(prefill, {})
        if decode not in doubts:
            if sum(map(len, self._doubts.values())) >= MAX_DOUBTS:
                self._drop_closed()
                return None
            served = self._served.setdefault(decode, 0)
            doubts[decode] = Doubt(Breaker(self._policy), served_before=served)
        return doubts[decode]

    def _drop_closed(self) -> None:
        """Make room by forgetting the pairs of which too little has failed for them to be left out."""
        for prefill, doubts in list(self._doubts.items()):
            for decode in [d for d, doubt in doubts.items() if doubt.breaker.state is BreakerState.CLOSED]:
                del doubts[decode]
            self._clear(prefill)

    def _clear(self, prefill: Endpoint) -> None:
        """Forget a P of which nothing is in doubt any more, or that it is a suspect."""
        if prefill in self.in_doubt and not self._is_suspect(prefill):
            del self.in_doubt[prefill]
        if not self._doubts.get(prefill):
            self._doubts.pop(prefill, None)
            whole = self._of_prefill.get(prefill)
            if whole is not None and not whole.failed_at and whole.breaker.state is BreakerState.CLOSED:
                del self._of_prefill[prefill]

    def _is_suspect(self, prefill: Endpoint) -> bool:
        doubts, whole = self._doubts.get(prefill, {}).values(), self._of_prefill.get(prefill)
        known = doubts if whole is None else (whole, *doubts)
        return any(each.breaker.state is not BreakerState.CLOSED for each in known)

    def _all(self) -> Iterator[tuple[Endpoint, Endpoint, Doubt]]:
        for prefill, doubts in self._doubts.items():
            for decode, doubt in doubts.items():
                yield prefill, decode, doubt

    def _tell(self, change: PairChange, *, ours: bool = True) -> None:
        if self.on_change is not None:
            self.on_change(change)
        if ours and self.on_verdict is not None:
            self.on_verdict(change)
