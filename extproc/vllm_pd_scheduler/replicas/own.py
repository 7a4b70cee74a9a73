"""What this replica does, until it is told to the others. It is the registry's journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..fleet.breaker import BreakerState
from ..fleet.endpoint import Endpoint
from ..fleet.pairs import PairChange
from ..fleet.registry import Registry
from ..fleet.reservation import Reservation
from ..models import InstanceRole
from ..request.context import RequestContext
from .answers import Answers
from .directory import Directory
from .message import (
    MAX_BLOCKS,
    MAX_ITEMS,
    MAX_OVERHEAD_S,
    MAX_PROMPT,
    MAX_REQUESTS,
    MAX_TOKEN_S,
    MAX_TOKENS,
    MAX_WORK_S,
    Ask,
    Drawn,
    Ended,
    Handed,
    Held,
    Learned,
    Message,
    PairVerdict,
    Placement,
    Prefill,
    Rates,
    Sent,
    Share,
    pack_blocks,
)
from .names import Names
from .placements import Told

_MAX_UNTOLD_BLOCKS = 50_000
"""Hashes in one message: of further prompts, where they are cached is not told."""
_MAX_PAIRS = 1000
_MAX_TENANTS = 1024
_NOTHING = (0, 0, False, 0, 0, False, 0)


class _Changed(set[Endpoint]):
    """Endpoints whose load has changed. When a request of ours ends, nothing else says it."""

    def __init__(self, own: OwnWork) -> None:
        super().__init__()
        self._own = own

    def add(self, endpoint: Endpoint) -> None:
        """Have an endpoint in it, which is news, unless it is others' load."""
        super().add(endpoint)
        own = self._own
        if not (own.deaf or own.untold):
            own.noted()


class OwnWork:
    """Collects what is to be told, at the cost of a few notes a request."""

    def __init__(self, registry: Registry, directory: Directory) -> None:
        self.wake: Callable[[], None] = _nobody
        """Called when there may be something to tell; often, so it should return at once."""
        self.deaf = False
        """Whether what others do is counted just now: a load that changes by that is nothing to tell."""
        self.untold = False
        """Whether there may be something to tell."""
        self._registry, self._directory = registry, directory
        self._changed = [registry.watch(role, _Changed(self)) for role in InstanceRole]
        self._numbers = 0
        self._queued: dict[Endpoint, dict[Reservation, tuple[int, int]]] = {}
        """By P, our prefills in its queue, with their numbers and prompts' tokens."""
        self._new: list[tuple[int, Reservation, int]] = []
        self._ended: list[Ended] = []
        self._placed: list[tuple[Endpoint, Sequence[int]]] = []
        self._sent: list[tuple[int, Reservation]] = []
        """Prefills that had claimed a P and stay there."""
        self._handed: dict[tuple[Endpoint, Endpoint], int] = {}
        self._blocks = 0
        self._shares: dict[Endpoint, tuple[int, int, bool, int, int, bool, int]] = {}
        """What was told of each endpoint."""
        self._verdicts: dict[Endpoint, tuple[int, int]] = {}
        """How often requests of ours had it ejected, and let it return."""
        self._pairs: dict[tuple[Endpoint, Endpoint | None, bool], tuple[int, int]] = {}
        """How often pairs of P and D were left out, and taken back; the last says whether texts are wrong."""
        self._new_pairs: dict[tuple[Endpoint, Endpoint | None, bool], None] = {}
        self._drawn: dict[tuple[int, bytes], float] = {}
        """What each tenant was given, by priority and hash, those last that were given something last."""
        self._new_draws: dict[tuple[int, bytes], None] = {}
        self._draws_to_repeat: dict[tuple[int, bytes], int] = {}
        """Those told lately, and in how many summaries they are told once more."""
        self._told = Told()
        self.answers = Answers(directory, self._told)
        self.done = 0
        """Prefills of ours that were done."""
        registry.pairs.on_verdict = self._pair_failed
        registry.wrong_pairs.on_verdict = self._pair_wrong

    # -- the registry's journal

    def reserved(self, reservation: Reservation, request: RequestContext) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        if not self.untold:
            self.noted()
        endpoint = reservation.endpoint
        if endpoint.instance.role is InstanceRole.PREFILL:
            self._numbers += 1
            prompt = min(MAX_PROMPT, round(request.prompt_tokens))
            self._queued.setdefault(endpoint, {})[reservation] = self._numbers, prompt
            if len(self._new) < MAX_ITEMS:
                self._new.append((self._numbers, reservation, prompt))
        elif request.blocks and len(self._placed) < MAX_ITEMS:
            self._placed.append((endpoint, request.blocks))

    def confirmed(self, reservation: Reservation) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        known = self._queued.get(reservation.endpoint, {}).get(reservation)
        if known is not None and len(self._sent) < MAX_ITEMS:
            self.noted()
            self._sent.append((known[0], reservation))

    def prefilled(self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        self.noted()
        self.done += 1
        known = self._queued.get(reservation.endpoint, {}).pop(reservation, None)
        if known is None:
            return
        if reservation.source is not None:  # what it took says nothing of P
            self._end(Ended(known[0]))
            return
        prompt = min(max(1, prompt_tokens), MAX_PROMPT)
        cached = -1 if cached_tokens is None else min(max(0, cached_tokens), MAX_PROMPT)
        self._end(Ended(known[0], prompt, cached))

    def handed_over(self, prefill: Endpoint, decode: Endpoint) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        self.noted()
        if len(self._handed) < MAX_ITEMS:
            self._handed[prefill, decode] = min(MAX_REQUESTS, self._handed.get((prefill, decode), 0) + 1)

    def drawn(self, priority: int, tenant: bytes, work: float) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        self.noted()
        key = priority, tenant
        self._drawn[key] = min(MAX_WORK_S, self._drawn.pop(key, 0.0) + work)
        self._new_draws[key] = None
        if len(self._drawn) > _MAX_TENANTS:
            oldest = next(iter(self._drawn))
            for known in (self._drawn, self._new_draws, self._draws_to_repeat):
                known.pop(oldest, None)

    def ejected(self, endpoint: Endpoint) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        out, back = self._verdicts.get(endpoint, (0, 0))
        self._verdict(endpoint, (out + 1, back))

    def recovered(self, endpoint: Endpoint) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        out, back = self._verdicts.get(endpoint, (0, 0))
        self._verdict(endpoint, (out, back + 1))

    def recoveries(self, endpoint: Endpoint) -> int:
        """Return how often a trial request of ours had an endpoint return."""
        return self._verdicts.get(endpoint, (0, 0))[1]

    def _verdict(self, endpoint: Endpoint, verdict: tuple[int, int]) -> None:
        self._verdicts[endpoint] = verdict
        self._changed[0].add(endpoint)
        self.noted()

    def _pair_failed(self, change: PairChange) -> None:
        self._pair(change.prefill, change.decode, False, change.out)

    def _pair_wrong(self, prefill: Endpoint, decode: Endpoint, out: bool) -> None:
        self._pair(prefill, decode, True, out)

    def _pair(self, prefill: Endpoint, decode: Endpoint | None, wrong: bool, is_out: bool) -> None:
        pair = prefill, decode, wrong
        if pair in self._pairs or len(self._pairs) < _MAX_PAIRS:
            out, back = self._pairs.get(pair, (0, 0))
            self._pairs[pair] = (out + is_out) % 65536, (back + (not is_out)) % 65536
            self._new_pairs[pair] = None
            self.noted()

    def _end(self, ended: Ended) -> None:
        if len(self._ended) < MAX_ITEMS:
            self._ended.append(ended)

    def _has_room(self, blocks: int) -> bool:
        self._blocks += blocks
        return self._blocks <= _MAX_UNTOLD_BLOCKS

    def noted(self) -> None:
        """Take it that there may be something to tell."""
        if not self.untold:
            self.untold = True
            self.wake()

    # -- what is told

    def changes(
        self, replica: str, number: int, waiting: tuple[int, int], now: float, asks: list[Ask], names: Names
    ) -> Message | None:
        """Return what has happened since the last message, and what is asked; ``None`` if nothing is.

        ``names`` are those of the endpoints of ``asks``.
        """
        changed = set[Endpoint]().union(*self._changed)
        self._find_given_up(changed)
        untold = self._new[0][0] if self._new else self._numbers + 1
        sent = [self._place_sent(names, number, *each) for each in self._sent if each[0] < untold]
        prefills = [self._prefill(names, number, each) for each in self._new]
        placed: list[Placement] = []
        for endpoint, blocks in self._placed:
            self._place(placed, names, number, endpoint, blocks)
        if self.answers.wanted:
            for endpoint, blocks in self.answers.placements(now):
                placed.append(Placement(names.place(endpoint), pack_blocks(blocks)))
                self._told.add(number, endpoint, blocks)
        handed = [Handed(names.place(p), names.place(d), count) for (p, d), count in self._handed.items()]
        shares = list(self._changed_shares(names, changed))
        pairs = self._told_pairs(names, self._new_pairs) if self._new_pairs else []
        drawn = [Drawn(*key, self._drawn[key]) for key in self._new_draws]
        if drawn:
            self._draws_to_repeat |= dict.fromkeys(self._new_draws, 2)
        held, rates = None, None
        if self.answers.wanted:
            held, rates = self.answers.held(now), self._rates(names) if self.answers.rates() else None
        ended = self._ended
        self._clear()
        told = shares, prefills, sent, ended, placed, handed, pairs, drawn, asks, held, rates
        if not any(told):
            return None
        return Message(
            replica, number, False, waiting, names.names, shares, prefills, ended, placed[:MAX_ITEMS],
            None, drawn, pairs, handed, asks,
            held and Held(names.add(held[0]), pack_blocks(held[1]), *held[2:]), rates, sent=sent,
        )  # fmt: skip

    def summary(self, replica: str, number: int, waiting: tuple[int, int]) -> Message:
        """Return all that this replica has: what others have of it besides has ended."""
        names, registry = Names(self._directory), self._registry
        self._shares = {e: told for e, told in self._shares.items() if e in registry and told != _NOTHING}
        self._queued = {e: queued for e, queued in self._queued.items() if queued and e in registry}
        self._verdicts = {e: verdict for e, verdict in self._verdicts.items() if e in registry}
        self._pairs = {
            pair: counts for pair, counts in self._pairs.items()
            if pair[0] in registry and (pair[1] is None or pair[1] in registry)
        }  # fmt: skip
        self._find_given_up(self._queued)
        list(self._changed_shares(names, registry))
        shares = [Share(names.place(e), *told) for e, told in self._shares.items() if told != _NOTHING]
        queued = [
            (number, each, prompt)
            for queue in self._queued.values()
            for each, (number, prompt) in queue.items()
        ]
        # Only what changes tell has the blocks of new prompts: a summary follows right after one.
        prefills = [self._prefill(names, 0, each) for each in sorted(queued, key=lambda each: each[0])]
        drawn = [Drawn(*key, self._drawn[key]) for key in self._draws_to_repeat]
        self._draws_to_repeat = {key: left - 1 for key, left in self._draws_to_repeat.items() if left > 1}
        pairs = self._told_pairs(names, self._pairs)
        return Message(
            replica, number, True, waiting, names.names[:MAX_ITEMS], shares[:MAX_ITEMS], prefills[:MAX_ITEMS],
            learned=self._learned(), drawn=drawn, pairs=pairs, blocks=len(registry.prefixes),
        )  # fmt: skip

    def _clear(self) -> None:
        self.untold = False
        self._new, self._sent, self._ended, self._placed, self._blocks = [], [], [], [], 0
        self._handed, self._new_pairs, self._new_draws = {}, {}, {}
        for changed in self._changed:
            changed.clear()

    def _find_given_up(self, endpoints: Iterable[Endpoint]) -> None:
        """Note the end of prefills that were released, or whose P was restarted."""
        for endpoint in endpoints:
            if queued := self._queued.get(endpoint):
                generation = endpoint.generation
                gone = [each for each in queued if not each.active or each.generation != generation]
                for reservation in gone:
                    self._end(Ended(queued.pop(reservation)[0]))

    def _prefill(self, names: Names, message: int, what: tuple[int, Reservation, int]) -> Prefill:
        """Return a prefill as it is told: with its blocks if a message is named."""
        number, reservation, prompt = what
        claimed = reservation.tentative
        packed = self._blocks_of(message, number, reservation) if message and not claimed else b""
        cached = reservation.cached + reservation.pulled
        few = min(prompt, round(cached)) if cached else 0
        place = names.place(reservation.endpoint)
        return Prefill(number, place, prompt, few, reservation.cached_blocks, packed, claimed)

    def _place_sent(self, names: Names, message: int, number: int, reservation: Reservation) -> Sent:
        packed = self._blocks_of(message, number, reservation)
        return Sent(number, names.place(reservation.endpoint), packed)

    def _blocks_of(self, message: int, number: int, reservation: Reservation) -> bytes:
        """Return the blocks of a prefill's prompt, as this message tells them."""
        blocks = reservation.blocks[:MAX_BLOCKS]
        if not blocks or not self._has_room(len(blocks)):
            return b""
        self._told.add(message, reservation.endpoint, blocks, number)
        return pack_blocks(blocks)

    def _place(
        self, placed: list[Placement], names: Names, message: int, endpoint: Endpoint, blocks: Sequence[int]
    ) -> None:
        """Add that a prompt is cached on an endpoint: by the prefill that has told its blocks, if one has."""
        few = blocks[:MAX_BLOCKS]
        if number := self._told.prefill_of(few):
            placed.append(Placement(names.place(endpoint), b"", number))
        elif self._has_room(len(few)):
            placed.append(Placement(names.place(endpoint), pack_blocks(few)))
        else:
            return
        self._told.add(message, endpoint, few)

    def _changed_shares(self, names: Names, endpoints: Iterable[Endpoint]) -> Iterator[Share]:
        """Yield what we have on each endpoint that is not as it was told."""
        verdicts, shares, closed = self._verdicts, self._shares, BreakerState.CLOSED
        for endpoint in endpoints:
            state, tokens = endpoint.breaker.state, round(endpoint.tokens - endpoint.tokens_elsewhere)
            out, back = verdicts.get(endpoint, (0, 0)) if verdicts else (0, 0)
            share = (
                endpoint.in_flight - endpoint.elsewhere,
                tokens if 0 <= tokens <= MAX_TOKENS else min(MAX_TOKENS, max(0, tokens)),
                state is not closed and state is BreakerState.HALF_OPEN and endpoint.on_our_trial,
                out % 65536,
                back % 65536,
                state is not closed and state is BreakerState.OPEN,
                endpoint.pending_handoffs,
            )
            if shares.get(endpoint, _NOTHING) != share:
                shares[endpoint] = share
                yield Share(names.place(endpoint), *share)

    def _told_pairs(
        self, names: Names, pairs: Iterable[tuple[Endpoint, Endpoint | None, bool]]
    ) -> list[PairVerdict]:
        is_out = self._registry.elsewhere.is_out
        return [
            PairVerdict(
                names.place(pair[0]),
                -1 if pair[1] is None else names.place(pair[1]),
                pair[2],
                *self._pairs[pair],
                is_out(*pair),
            )
            for pair in pairs
        ]

    def _learned(self) -> Learned | None:
        prefill, decode = self._registry.load.prefill, self._registry.load.decode
        if not (prefill.samples and decode.samples):
            return None
        return Learned(_three(prefill.coefficients), _three(decode.coefficients))

    def _rates(self, names: Names) -> Rates:
        known, find = self._registry.load.transfers.known(_MAX_PAIRS), self._registry.find
        return Rates(
            (min(MAX_OVERHEAD_S, known.fleet[0]), min(MAX_TOKEN_S, known.fleet[1])),
            [(names.place(e), factor) for each, factor in known.instances.items() if (e := find(each))],
            [
                (names.place(p), names.place(d), factor)
                for pair, factor in known.pairs.items()
                if (p := find(pair[0])) and (d := find(pair[1]))
            ],
        )


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    a, b, c = values
    return min(a, MAX_OVERHEAD_S), min(b, MAX_TOKEN_S), min(c, MAX_TOKEN_S)


def _nobody() -> None:
    """Wake nobody: the caller asks by itself."""
