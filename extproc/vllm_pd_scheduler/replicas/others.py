"""What the other replicas have in flight, as they tell it, counted in this scheduler's registry."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fleet.endpoint import Endpoint, Reservation
from ..fleet.registry import Registry, UnknownInstance
from .message import (
    MAX_ITEMS,
    MAX_REQUESTS,
    MAX_TOKENS,
    Ended,
    Ignored,
    Message,
    Prefill,
    Share,
    unpack_blocks,
)

SILENT_S = 3.0
"""Seconds after which a replica of which nothing was heard is taken for gone, and its requests with it."""
MAX_REPLICAS = 64
_MAX_AHEAD = 10_000
"""Messages that may have been lost at once: some 100 s of them. One that was silent may begin anywhere."""
_MAX_GONE = 1024
"""Replicas that are gone, of which it is known what they said last."""


@dataclass(slots=True)
class _Share:
    """What is counted of one replica on one endpoint."""

    generation: int
    requests: int = 0
    tokens: int = 0
    trial: Reservation | None = None
    verdict: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class _Other:
    """One other replica."""

    number: int
    heard_at: float
    waiting: tuple[int, int] = (0, 0)
    summarised: bool = False
    """Whether all that it had when it was first heard is known."""
    shares: dict[Endpoint, _Share] = field(default_factory=dict)
    prefills: dict[int, Reservation] = field(default_factory=dict)


class Others:
    """Every number that it adds to the registry it takes away again, so nothing of a replica stays."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._others: dict[str, _Other] = {}
        self._gone: dict[str, int] = {}
        """The number of the last message of replicas that were forgotten, the newest last."""

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
        found = [other.waiting for other in self._others.values()]
        return sum(each[0] for each in found), sum(each[1] for each in found)

    def receive(self, message: Message, now: float) -> Ignored | None:
        """Count what a message tells; return why not, if it is not used."""
        other = self._others.get(message.replica)
        if other is None:
            if message.number <= self._gone.get(message.replica, 0):
                return Ignored.REPLAYED
            if len(self._others) >= MAX_REPLICAS:
                return Ignored.TOO_MANY
            self._gone.pop(message.replica, None)
            other = self._others[message.replica] = _Other(message.number, now)
        elif message.number <= other.number:
            return Ignored.REPLAYED
        elif message.number > other.number + _MAX_AHEAD:
            return Ignored.FUTURE
        other.number, other.heard_at, other.waiting = message.number, now, message.waiting
        self._apply(other, message, now)
        return None

    def forget_silent(self, now: float) -> list[str]:
        """Forget the replicas that were silent for ``SILENT_S``, with all they had; return their names."""
        silent = [name for name, other in self._others.items() if now - other.heard_at >= SILENT_S]
        for name in silent:
            other = self._others.pop(name)
            for endpoint, share in other.shares.items():
                self._count(endpoint, share, Share(0, 0, 0))
            self._cancel(other, set(other.prefills), now)
            self._gone[name] = other.number
            if len(self._gone) > _MAX_GONE:
                del self._gone[next(iter(self._gone))]
        return silent

    def _apply(self, other: _Other, message: Message, now: float) -> None:
        endpoints = [self._find(each) for each in message.endpoints]
        for prefill in message.prefills:
            self._enqueue(other, endpoints[prefill.endpoint], prefill, now)
        for ended in message.ended:
            self._end(other, ended, now)
        for placed in message.placed:
            if (holder_of := endpoints[placed.endpoint]) is not None:
                holder_of.holder.store(unpack_blocks(placed.blocks))
        told = set()
        for share in message.shares:
            if (endpoint := endpoints[share.endpoint]) is not None:
                told.add(endpoint)
                self._told(other, endpoint, share, now)
        if message.summary:
            self._keep_only(other, told, {each.number for each in message.prefills}, now)
            other.summarised = True
        if message.learned is not None:
            self._registry.learning.told(message.learned.prefill, message.learned.decode)

    def _find(self, endpoint_id: str) -> Endpoint | None:
        """Return the endpoint with an id; ``None`` if this replica does not know it, yet or any more."""
        try:
            return self._registry.get(endpoint_id)
        except UnknownInstance:
            return None

    # -- prefills

    def _enqueue(self, other: _Other, endpoint: Endpoint | None, what: Prefill, now: float) -> None:
        if endpoint is None or what.number in other.prefills or len(other.prefills) >= MAX_ITEMS:
            return
        blocks = unpack_blocks(what.blocks)
        cached = float(min(what.cached, what.prompt)), min(what.cached_blocks, len(blocks))
        claim = self._registry.elsewhere.enqueue(endpoint, float(what.prompt), cached, blocks, now)
        other.prefills[what.number] = claim
        if blocks:
            endpoint.holder.store(blocks)

    def _end(self, other: _Other, ended: Ended, now: float) -> None:
        claim = other.prefills.pop(ended.number, None)
        if claim is None:
            return
        if not ended.prompt:
            self._registry.elsewhere.cancel(claim, now)
            return
        cached = None if ended.cached < 0 else min(ended.cached, ended.prompt)
        self._registry.elsewhere.prefilled(claim, ended.prompt, cached, now)

    def _cancel(self, other: _Other, numbers: set[int], now: float) -> None:
        for number in sorted(numbers):
            self._registry.elsewhere.cancel(other.prefills.pop(number), now)

    # -- shares

    def _told(self, other: _Other, endpoint: Endpoint, told: Share, now: float) -> None:
        share = other.shares.get(endpoint)
        verdict = told.ejections, told.recoveries
        if share is None:
            share = other.shares[endpoint] = _Share(endpoint.generation)
        self._count(endpoint, share, told)
        # What happened before it was first heard is not news.
        before, share.verdict = share.verdict if other.summarised else verdict, verdict
        if verdict[1] != before[1]:
            self._registry.elsewhere.readmit(endpoint)
        elif verdict[0] != before[0]:
            self._registry.elsewhere.eject(endpoint, now)

    def _count(self, endpoint: Endpoint, share: _Share, told: Share) -> None:
        """Replace what is counted by what is told."""
        if share.generation != endpoint.generation:  # its restart has set all to zero
            share.generation, share.requests, share.tokens = endpoint.generation, 0, 0
        requests = min(told.requests, MAX_REQUESTS)
        tokens = min(told.tokens, MAX_TOKENS) if requests else 0
        if (requests, tokens) != (share.requests, share.tokens):
            endpoint.sent_elsewhere(requests - share.requests, tokens - share.tokens)
            share.requests, share.tokens = requests, tokens
        if told.on_trial and share.trial is None:
            share.trial = Reservation(endpoint, endpoint.generation, elsewhere=True)
            endpoint.tried_elsewhere(share.trial)
        elif not told.on_trial and share.trial is not None:
            share.trial.active, share.trial = False, None

    def _keep_only(self, other: _Other, told: set[Endpoint], numbers: set[int], now: float) -> None:
        """Take away what a summary does not have."""
        for endpoint in [each for each in other.shares if each not in told]:
            self._count(endpoint, other.shares.pop(endpoint), Share(0, 0, 0))
        self._cancel(other, other.prefills.keys() - numbers, now)
