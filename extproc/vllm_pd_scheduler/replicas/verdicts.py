"""What other replicas have found of instances and pairs: that they fail, or work again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..fleet.breaker import BreakerState
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from .message import Disbelieved, PairVerdict, Share
from .own import OwnWork

_Pair = tuple[Endpoint, Endpoint | None, bool]


@dataclass(slots=True)
class Verdicts:
    """What one other replica has found, and what was believed of it."""

    counts: dict[Endpoint, tuple[int, int]] = field(default_factory=dict)
    """By endpoint, how often it had it ejected, and let it return."""
    ejected: dict[Endpoint, int] = field(default_factory=dict)
    """Endpoints that were ejected by its word, and how often requests of ours had let them return by then."""
    pairs: dict[_Pair, tuple[int, int]] = field(default_factory=dict)
    left_out: set[_Pair] = field(default_factory=set)


class Judge:
    """Takes over verdicts of others: as if they were ours, but not more than a part of them by one's word."""

    def __init__(self, registry: Registry, own: OwnWork, disbelieved: Counter[Disbelieved]) -> None:
        self._registry, self._own, self._disbelieved = registry, own, disbelieved

    def endpoint(self, known: Verdicts, endpoint: Endpoint, told: Share, first: bool, now: float) -> None:
        """Take what another says of an endpoint; ``first``: what it had found before is new to us."""
        verdict = told.ejections, told.recoveries
        before, known.counts[endpoint] = known.counts.get(endpoint, verdict if first else (0, 0)), verdict
        if verdict[1] != before[1]:
            if self._registry.elsewhere.readmit(endpoint, now):
                known.ejected.pop(endpoint, None)
            else:
                self._disbelieved[Disbelieved.RECOVERIES] += 1
        elif verdict[0] != before[0] or (first and told.out):
            self._eject(known, endpoint, now)

    def _eject(self, known: Verdicts, endpoint: Endpoint, now: float) -> None:
        if endpoint.breaker.state is BreakerState.OPEN:
            return
        # It serves us: between that replica and the instance something is broken, not here.
        overruled = self._own.recoveries(endpoint) > known.ejected.get(endpoint, 1 << 60)
        role = endpoint.instance.role
        closed = BreakerState.CLOSED
        out = sum(e.breaker.state is not closed for e in known.ejected if e.instance.role is role)
        share = self._registry.policy.max_ejected_share / 2
        if overruled or (endpoint not in known.ejected and out >= self._most(share, role)):
            self._disbelieved[Disbelieved.EJECTIONS] += 1
        elif self._registry.elsewhere.eject(endpoint, now):
            known.ejected[endpoint] = self._own.recoveries(endpoint)

    def pair(
        self, known: Verdicts, prefill: Endpoint, decode: Endpoint | None, told: PairVerdict, first: bool,
        now: float,
    ) -> None:  # fmt: skip
        """Take what another says of a pair."""
        pair, verdict = (prefill, decode, told.wrong), (told.out, told.back)
        before, known.pairs[pair] = known.pairs.get(pair, verdict if first else (0, 0)), verdict
        elsewhere = self._registry.elsewhere
        if verdict[1] != before[1] and not told.stands:
            known.left_out.discard(pair)
            elsewhere.take_back(prefill, decode, told.wrong)
        elif (verdict[0] != before[0] or first) and told.stands:
            known.left_out = {each for each in known.left_out if elsewhere.is_out(*each)}
            if pair in known.left_out or self._may_leave_out(known, prefill, decode):
                known.left_out.add(pair)
                elsewhere.leave_out(prefill, decode, told.wrong, now)
            else:
                self._disbelieved[Disbelieved.PAIRS] += 1

    def _may_leave_out(self, known: Verdicts, prefill: Endpoint, decode: Endpoint | None) -> bool:
        """Whether a P keeps most of its D by this one's word, a D most of its P, and the fleet most P."""
        share, out = self._registry.policy.max_ejected_share, known.left_out
        if decode is None:
            return sum(d is None for _, d, _ in out) < self._most(share / 2, InstanceRole.PREFILL)
        of_prefill = sum(p is prefill and d is not None for p, d, _ in out)
        of_decode = sum(d is decode for _, d, _ in out)
        return of_prefill < self._most(share, InstanceRole.DECODE) and of_decode < self._most(
            share, InstanceRole.PREFILL
        )

    def forget_gone(self, known: Verdicts) -> None:
        """Forget what was told of endpoints that are gone."""
        there = self._registry
        if len(known.counts) > len(there.endpoints()):
            known.counts = {each: count for each, count in known.counts.items() if each in there}
        known.ejected = {each: count for each, count in known.ejected.items() if each in there}
        if known.pairs:
            known.pairs = {
                pair: count for pair, count in known.pairs.items()
                if pair[0] in there and (pair[1] is None or pair[1] in there)
            }  # fmt: skip

    def _most(self, share: float, role: InstanceRole) -> int:
        return max(1, int(share * len(self._registry.endpoints(role))))
