"""What the other replicas have in flight, as they tell it, counted in this scheduler's registry."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..fleet.reservation import Reservation
from ..models import InstanceRole
from ..prediction.transfer_rates import KnownRates
from . import plausible
from .directory import Directory
from .joining import Joining
from .message import (
    MAX_ITEMS,
    Disbelieved,
    Drawn,
    Ended,
    Ignored,
    Message,
    Prefill,
    Rates,
    Sent,
    Share,
    unpack_blocks,
)
from .other import Counted, Other
from .own import OwnWork
from .plausible import Budget
from .verdicts import Judge

SILENT_S = 3.0
"""Seconds after which a replica of which nothing was heard is taken for gone, and its requests with it."""
MAX_REPLICAS = 64
_MAX_AHEAD = 10_000
"""Messages that may have been lost at once: some 100 s of them. One that was silent may begin anywhere."""
_MAX_GONE = 1024
"""Replicas that are gone, of which it is known what they said last."""
_MAX_TENANTS = 2048
_NO_BLOCKS: Sequence[int] = ()
_NOT_CACHED = (0.0, 0)


class Others:
    """Every number that it adds to the registry it takes away again, so nothing of a replica stays."""

    def __init__(self, name: str, registry: Registry, directory: Directory, own: OwnWork) -> None:
        self.disbelieved: Counter[Disbelieved] = Counter()
        """Claims that were not believed, by kind."""
        self.joining = Joining(registry)
        self.changes = 0
        """How often a replica came or went."""
        self._name, self._registry, self._directory, self._own = name, registry, directory, own
        self._judge = Judge(registry, own, self.disbelieved)
        self._others: dict[str, Other] = {}
        self._changed: set[Endpoint] = set()
        """Those whose queue of prefills a message has changed."""
        self._gone: dict[str, int] = {}
        """The number of the last message of replicas that were forgotten, the newest last."""
        registry.elsewhere.on_scraped = self._scraped

    @property
    def names(self) -> list[str]:
        """Those of which something was heard lately."""
        return list(self._others)

    def silent_for(self, now: float) -> dict[str, float]:
        """Return for how many seconds nothing was heard of each, by name."""
        return {name: now - other.heard_at for name, other in self._others.items()}

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests in their queues, for P and for D."""
        return self._registry.elsewhere.waiting

    def receive(self, message: Message, now: float) -> Ignored | None:
        """Count what a message tells; return why not, if it is not used."""
        other = self._others.get(message.replica)
        if other is None:
            gone = self._gone.get(message.replica, 0)
            if message.number <= gone:
                return Ignored.REPLAYED
            if len(self._others) >= MAX_REPLICAS:
                return Ignored.TOO_MANY
            self._gone.pop(message.replica, None)
            budgets = plausible.messages(now), Budget(math.inf, now)
            other = self._others[message.replica] = Other(
                message.replica, message.number, now, *budgets, back=gone > 0
            )
            self._membership_changed()
        elif message.number <= other.number:
            return Ignored.REPLAYED
        elif message.number > other.number + _MAX_AHEAD:
            return Ignored.FUTURE
        if not plausible.may_send(other.messages, now):
            return Ignored.TOO_OFTEN
        if message.number > other.number + 1:
            self.joining.missed(message.replica, other.number + 1, message.number - 1)
        other.number, other.heard_at = message.number, now
        if other.waiting != message.waiting:
            other.waiting = message.waiting
            self._count_waiting()
        self._apply(other, message, now)
        return None

    def forget_silent(self, now: float) -> list[str]:
        """Forget the replicas that were silent for ``SILENT_S``, with all they had; return their names."""
        silent = [name for name, other in self._others.items() if now - other.heard_at >= SILENT_S]
        if not silent:
            return silent
        for name in silent:
            other = self._others.pop(name)
            for endpoint, share in other.shares.items():
                self._told(endpoint, share, Share(0, 0, 0), now)
            self._cancel(other, other.prefills.keys(), now)
            self._tell_watchers()
            self.joining.left(name)
            self._gone[name] = other.number
            if len(self._gone) > _MAX_GONE:
                del self._gone[next(iter(self._gone))]
        self._count_waiting()
        self._membership_changed()
        return silent

    def _membership_changed(self) -> None:
        self.changes += 1
        self._registry.claims.among(self._name, self.names)

    def _count_waiting(self) -> None:
        found = [other.waiting for other in self._others.values()]
        self._registry.elsewhere.waiting = sum(each[0] for each in found), sum(each[1] for each in found)

    def _apply(self, other: Other, message: Message, now: float) -> None:
        endpoints = self._directory.find_all(message.endpoints)
        over = {each.number for each in message.ended}
        for prefill in message.prefills:
            if (endpoint := endpoints[prefill.endpoint]) is not None:
                blocks = self._cached(other, endpoint, prefill) if prefill.blocks else _NO_BLOCKS
                if prefill.number not in over:  # else it came and went between two messages
                    self._enqueue(other, endpoint, prefill, blocks, now)
        for sent in message.sent:
            if (endpoint := endpoints[sent.endpoint]) is not None:
                self._send(other, endpoint, sent, now)
        for placed in message.placed:
            if (endpoint := endpoints[placed.endpoint]) is not None:
                number = placed.prefill
                blocks = other.heard.get(number) if number else unpack_blocks(placed.blocks)
                if blocks:
                    endpoint.holder.store(blocks)
        for ended in message.ended:
            self._end(other, ended, now)
        told = set()
        for share in message.shares:
            if (endpoint := endpoints[share.endpoint]) is not None:
                told.add(endpoint)
                self._share(other, endpoint, share, now)
        for handed in message.handed:
            p, d = endpoints[handed.prefill], endpoints[handed.decode]
            if p is not None and d is not None:
                self._registry.elsewhere.handed_over(p, d, handed.count)
        for pair in message.pairs:
            p, d = endpoints[pair.prefill], endpoints[pair.decode] if pair.decode >= 0 else None
            if p is not None and (d is not None or pair.decode < 0):
                self._judge.pair(other.verdicts, p, d, pair, not other.summarised, now)
        if message.drawn:
            self._draw(other, message.drawn, now)
        for ask in message.asks:
            if ask.replica == self._name:
                self._own.answers.asked(ask, message.endpoints)
        if message.held is not None or message.learned is not None or message.rates is not None:
            self._learn(message, endpoints, now)
        if message.summary:
            self._keep_only(other, told, {each.number for each in message.prefills}, now)
            self._judge.forget_gone(other.verdicts)
            if not other.summarised:
                other.summarised = True
                self.joining.heard(message.replica, message.blocks, other.back, now)
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        """Have those who watch the queues of P look at those that have changed."""
        for endpoint in self._changed:
            endpoint.work_changes()
        self._changed.clear()

    def _learn(self, message: Message, endpoints: list[Endpoint | None], now: float) -> None:
        """Take what another has learned, which one that has learned nothing yet uses."""
        if (held := message.held) is not None and (endpoint := endpoints[held.endpoint]) is not None:
            self.joining.answered(message.replica, endpoint, held, now)
        if message.learned is not None:
            self._registry.learning.told(message.learned.prefill, message.learned.decode)
        if message.rates is not None:
            self._registry.load.transfers.adopt(_known(message.rates, endpoints))

    # -- prefills and placements

    def _cached(self, other: Other, endpoint: Endpoint, what: Prefill | Sent) -> Sequence[int]:
        """Take the prompt of a prefill for cached; return its blocks."""
        blocks = unpack_blocks(what.blocks)
        other.heard.add(what.number, blocks)
        endpoint.holder.store(blocks)
        return blocks

    def _enqueue(
        self, other: Other, endpoint: Endpoint, what: Prefill, blocks: Sequence[int], now: float
    ) -> None:
        number, elsewhere = what.number, self._registry.elsewhere
        if (known := other.prefills.get(number)) is not None:
            if not what.claimed:  # a summary says so, if the message is lost that did
                elsewhere.sent(known, known.blocks, now)
            return
        if len(other.prefills) >= MAX_ITEMS:
            return
        most = plausible.LONGEST_PROMPT if endpoint.kv_capacity is None else endpoint.kv_capacity
        prompt = what.prompt if what.prompt < most else most
        cached = (min(what.cached, prompt), what.cached_blocks) if what.cached else _NOT_CACHED
        claim = other.prefills[number] = elsewhere.enqueue(
            endpoint, prompt, cached, blocks, now, other.name, is_sent=not what.claimed
        )
        share = other.shares.get(endpoint) or self._share_of(other, endpoint)
        if share.claim.growth <= 0 or share.queued >= plausible.UNSCRAPED:
            self.disbelieved[Disbelieved.PREFILLS] += 1
            elsewhere.cancel(claim, now)
        else:
            share.queued += 1
            self._changed.add(endpoint)

    def _send(self, other: Other, endpoint: Endpoint, sent: Sent, now: float) -> None:
        blocks = self._cached(other, endpoint, sent) if sent.blocks else _NO_BLOCKS
        claim = other.prefills.get(sent.number)
        if claim is not None and claim.endpoint is endpoint:
            self._registry.elsewhere.sent(claim, blocks, now)
            self._changed.add(endpoint)

    def _end(self, other: Other, ended: Ended, now: float) -> None:
        claim = other.prefills.pop(ended.number, None)
        if claim is None or not self._unqueue(other, claim):
            return  # it was begun in the same message, or was not believed
        elsewhere, prompt = self._registry.elsewhere, ended.prompt
        if not prompt:
            elsewhere.cancel(claim, now)
            return
        cached = None if ended.cached < 0 else min(ended.cached, prompt)
        if (times := elsewhere.done(claim, prompt, cached, now)) is None:
            return
        lessons = other.lessons
        if not lessons.believed(*times) and self._registry.load.prefill.samples >= plausible.SETTLED:
            self.disbelieved[Disbelieved.TIMES] += 1
        elif lessons.learned <= 2 * self._own.done + plausible.UNTAUGHT:
            lessons.learned += 1
            elsewhere.learn(claim, prompt, cached, times[0])

    def _unqueue(self, other: Other, claim: Reservation) -> bool:
        """Count a prefill that ends no more; return whether it counted."""
        if not claim.active:
            return False
        if (share := other.shares.get(claim.endpoint)) is not None:
            share.queued -= 1
        self._changed.add(claim.endpoint)
        return True

    def _cancel(self, other: Other, numbers: Iterable[int], now: float) -> None:
        for number in sorted(numbers):
            claim = other.prefills.pop(number)
            self._unqueue(other, claim)
            self._registry.elsewhere.cancel(claim, now)

    # -- shares

    def _share_of(self, other: Other, endpoint: Endpoint) -> Counted:
        share = other.shares.get(endpoint)
        if share is None:
            share = other.shares[endpoint] = Counted(endpoint.generation)
            if endpoint.metrics is not None:
                share.claim.growth = plausible.GROWTH
        return share

    def _share(self, other: Other, endpoint: Endpoint, told: Share, now: float) -> None:
        self._told(endpoint, other.shares.get(endpoint) or self._share_of(other, endpoint), told, now)
        if told.ejections or told.recoveries or told.out:
            # What happened before it was first heard is not news.
            self._judge.endpoint(other.verdicts, endpoint, told, not other.summarised, now)

    def _told(self, endpoint: Endpoint, share: Counted, told: Share, now: float) -> None:
        """Replace what is counted by what is told, as far as that is believed."""
        share.claim.told = told.requests, told.tokens
        self._count(endpoint, share)
        if told.handoffs != share.handoffs:
            handoffs = min(told.handoffs, plausible.UNSCRAPED)
            endpoint.holds_elsewhere(handoffs - share.handoffs)
            share.handoffs = handoffs
        if told.on_trial or share.trial is not None:
            self._try(endpoint, share, told.on_trial, now)

    def _try(self, endpoint: Endpoint, share: Counted, runs: bool, now: float) -> None:
        """Take another's request for the trial while it runs, but not for ever."""
        if share.trial is None:
            share.trial = Reservation(endpoint, endpoint.generation, at=now, elsewhere=True)
            endpoint.tried_elsewhere(share.trial)
        elif not runs:
            share.trial.active, share.trial = False, None
        elif now - share.trial.at > plausible.TRIAL_S and share.trial.active:
            share.trial.active = False
            self.disbelieved[Disbelieved.TRIALS] += 1

    def _count(self, endpoint: Endpoint, share: Counted) -> None:
        """Count what is believed."""
        if share.generation != endpoint.generation:  # its restart has set all to zero
            share.generation, share.requests, share.tokens, share.handoffs = endpoint.generation, 0, 0, 0
        requests, tokens = share.claim.believed(endpoint)
        if requests != share.requests or tokens != share.tokens:
            endpoint.sent_elsewhere(requests - share.requests, tokens - share.tokens)
            share.requests, share.tokens = requests, tokens

    def _keep_only(self, other: Other, told: set[Endpoint], numbers: set[int], now: float) -> None:
        """Take away what a summary does not have."""
        self._cancel(other, other.prefills.keys() - numbers, now)
        for endpoint in [each for each in other.shares if each not in told]:
            share = other.shares[endpoint]
            self._told(endpoint, share, Share(0, 0, 0), now)
            if not share.queued and share.claim.trusted:
                del other.shares[endpoint]

    def _scraped(self, endpoint: Endpoint) -> None:
        """Compare what the others claim of an endpoint with what it says itself."""
        found = [(o, share) for o in self._others.values() if (share := o.shares.get(endpoint)) is not None]
        if not found:
            return
        if not plausible.settle(endpoint, [(share.claim, share.queued) for _, share in found]):
            self.disbelieved[Disbelieved.LOAD] += 1
        for other, share in found:
            if share.generation != endpoint.generation:
                self._count(endpoint, share)
            believed = share.claim.believed(endpoint)
            if believed != (share.requests, share.tokens):
                endpoint.never_there(share.requests - believed[0], share.tokens - believed[1])
                share.requests, share.tokens = believed
            if share.queued:
                self._drop_unknown(other, endpoint, share)

    def _drop_unknown(self, other: Other, endpoint: Endpoint, share: Counted) -> None:
        """Take prefills for ended that a P should know for long, and says that it does not have."""
        metrics = endpoint.metrics
        if metrics is None:
            return
        there = max(0, int(1.25 * (metrics.running + metrics.waiting)) - endpoint.own_in_flight)
        trusted, since = share.claim.trusted, metrics.taken_at - plausible.OLD_S
        if share.queued <= there:
            return
        claims = [each for each in other.prefills.values() if each.active and each.endpoint is endpoint]
        known = [each for each in claims if not trusted or each.at < since]
        for claim in known[: max(0, len(known) - there)]:
            self.disbelieved[Disbelieved.PREFILLS] += 1
            self._unqueue(other, claim)
            self._registry.elsewhere.cancel(claim, metrics.taken_at)
        self._tell_watchers()

    # -- tenants

    def _draw(self, other: Other, drawn: Sequence[Drawn], now: float) -> None:
        """Count what tenants were served there for their turns here: no more than the fleet can do."""
        servers = max(1, len(self._registry.endpoints(InstanceRole.PREFILL)))
        rate, at_once = plausible.DRAWS_PER_S * servers, plausible.DRAWS_AHEAD_S * servers
        for each in drawn:
            key = each.priority, each.tenant
            before = other.drawn.pop(key, 0.0 if other.summarised else each.work)
            other.drawn[key] = each.work
            if len(other.drawn) > _MAX_TENANTS:
                del other.drawn[next(iter(other.drawn))]
            new = each.work - before if each.work >= before else each.work  # it has begun anew
            if new <= 0.0:
                continue
            believed = other.draws.take(new, rate, at_once, now)
            if believed < new:
                self.disbelieved[Disbelieved.DRAWS] += 1
            self._registry.elsewhere.drawn(each.priority, each.tenant, believed)


def _known(rates: Rates, endpoints: Sequence[Endpoint | None]) -> KnownRates:
    """Return what a message says of pairs, as far as these endpoints are known."""
    names = [None if each is None else each.id for each in endpoints]
    instances = {name: factor for at, factor in rates.instances if (name := names[at]) is not None}
    pairs = {
        (prefill, decode): factor
        for p, d, factor in rates.pairs
        if (prefill := names[p]) is not None and (decode := names[d]) is not None
    }
    return KnownRates(rates.fleet, instances, pairs)
