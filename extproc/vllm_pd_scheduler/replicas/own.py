"""What this replica does, until it is told to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..fleet.endpoint import Endpoint, Reservation
from ..fleet.registry import Registry
from ..models import InstanceRole
from ..request.context import RequestContext
from .message import (
    MAX_ITEMS,
    MAX_PROMPT,
    MAX_REQUESTS,
    MAX_TOKENS,
    Ended,
    Learned,
    Message,
    Placement,
    Prefill,
    Share,
    pack_blocks,
)

_MAX_UNTOLD_BLOCKS = 50_000
"""Hashes in one message: of further prompts, where they are cached is not told."""


class Names:
    """The ids of a message's endpoints, and the place of each in their list."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, endpoint: Endpoint) -> int:
        """Return the place of an endpoint's id."""
        found = self._places.setdefault(endpoint.id, len(self.ids))
        if found == len(self.ids):
            self.ids.append(endpoint.id)
        return found


class _Changed(set[Endpoint]):
    """Endpoints whose load has changed. All that a replica does comes with such a change."""

    def __init__(self, own: OwnWork) -> None:
        super().__init__()
        self._own = own

    def add(self, endpoint: Endpoint) -> None:
        """Have an endpoint in it, and wake who tells the others."""
        super().add(endpoint)
        self._own.wake()


class OwnWork:
    """Collects what is to be told. It is the registry's journal, and costs a request a few notes."""

    def __init__(self, registry: Registry) -> None:
        self.wake: Callable[[], None] = _nobody
        """Called when there may be something to tell; often, so it should return at once."""
        self._registry = registry
        self._changed = [registry.watch(role, _Changed(self)) for role in InstanceRole]
        self._numbers = 0
        self._queued: dict[Endpoint, dict[Reservation, tuple[int, int]]] = {}
        """By P, our prefills in its queue, with their numbers and prompts' tokens."""
        self._new: list[tuple[int, Reservation, int]] = []
        self._ended: list[Ended] = []
        self._placed: list[tuple[Endpoint, tuple[int, ...]]] = []
        self._blocks = 0
        self._told: dict[Endpoint, tuple[int, int, bool, int, int]] = {}
        self._verdicts: dict[Endpoint, tuple[int, int]] = {}
        """How often requests of ours had it ejected, and let it return."""

    # -- the registry's journal

    def reserved(self, reservation: Reservation, request: RequestContext) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        endpoint = reservation.endpoint
        if endpoint.instance.role is InstanceRole.PREFILL:
            self._numbers += 1
            prompt = min(MAX_PROMPT, round(request.prompt_tokens))
            self._queued.setdefault(endpoint, {})[reservation] = self._numbers, prompt
            if len(self._new) < MAX_ITEMS:
                self._new.append((self._numbers, reservation, prompt))
        elif request.blocks and self._has_room(len(request.blocks)) and len(self._placed) < MAX_ITEMS:
            self._placed.append((endpoint, tuple(request.blocks)))

    def prefilled(self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        known = self._queued.get(reservation.endpoint, {}).pop(reservation, None)
        if known is not None:
            prompt = min(max(1, prompt_tokens), MAX_PROMPT)
            cached = -1 if cached_tokens is None else min(max(0, cached_tokens), MAX_PROMPT)
            self._end(Ended(known[0], prompt, cached))

    def ejected(self, endpoint: Endpoint) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        out, back = self._verdicts.get(endpoint, (0, 0))
        self._verdict(endpoint, (out + 1, back))

    def recovered(self, endpoint: Endpoint) -> None:
        """See :class:`vllm_pd_scheduler.fleet.elsewhere.Journal`."""
        out, back = self._verdicts.get(endpoint, (0, 0))
        self._verdict(endpoint, (out, back + 1))

    def _verdict(self, endpoint: Endpoint, verdict: tuple[int, int]) -> None:
        self._verdicts[endpoint] = verdict
        self._changed[0].add(endpoint)

    def _end(self, ended: Ended) -> None:
        if len(self._ended) < MAX_ITEMS:
            self._ended.append(ended)

    def _has_room(self, blocks: int) -> bool:
        self._blocks += blocks
        return self._blocks <= _MAX_UNTOLD_BLOCKS

    # -- what is told

    @property
    def untold(self) -> bool:
        """Whether there may be something to tell."""
        return bool(self._new or self._ended or self._placed or any(self._changed))

    def changes(self, replica: str, number: int, waiting: tuple[int, int]) -> Message | None:
        """Return what has happened since the last message; ``None`` if nothing has."""
        names, changed = Names(), set[Endpoint]().union(*self._changed)
        self._find_given_up(changed)
        prefills = [self._prefill(names, each, True) for each in self._new]
        placed = [Placement(names.place(e), pack_blocks(blocks)) for e, blocks in self._placed]
        shares = list(self._shares(names, changed))
        ended = self._ended
        self._clear()
        if not (shares or prefills or ended or placed):
            return None
        return Message(replica, number, False, waiting, names.ids, shares, prefills, ended, placed)

    def summary(self, replica: str, number: int, waiting: tuple[int, int]) -> Message:
        """Return all that this replica has: what others have of it besides has ended."""
        names = Names()
        self._told = {e: told for e, told in self._told.items() if e in self._registry}
        self._queued = {e: queued for e, queued in self._queued.items() if queued and e in self._registry}
        self._verdicts = {e: verdict for e, verdict in self._verdicts.items() if e in self._registry}
        self._find_given_up(self._queued)
        for endpoint in [e for e in self._told if self._told[e] == (0, 0, False, 0, 0)]:
            del self._told[endpoint]
        list(self._shares(names, self._registry))
        shares = [Share(names.place(e), *told) for e, told in self._told.items() if any(told)]
        queued = [
            (number, each, prompt)
            for queue in self._queued.values()
            for each, (number, prompt) in queue.items()
        ]
        # Only what changes tell has the blocks of new prompts: a summary follows right after one.
        prefills = [self._prefill(names, each, False) for each in sorted(queued, key=lambda each: each[0])]
        load = self._registry.load
        prefill, decode = load.prefill, load.decode
        learned = Learned(_three(prefill.coefficients), _three(decode.coefficients))
        return Message(
            replica, number, True, waiting, names.ids[:MAX_ITEMS], shares[:MAX_ITEMS], prefills[:MAX_ITEMS],
            learned=learned if prefill.samples and decode.samples else None,
        )  # fmt: skip

    def _clear(self) -> None:
        self._new, self._ended, self._placed, self._blocks = [], [], [], 0
        for changed in self._changed:
            changed.clear()

    def _find_given_up(self, endpoints: Iterable[Endpoint]) -> None:
        """Note the end of prefills that were released, or whose P was restarted."""
        for endpoint in endpoints:
            queued = self._queued.get(endpoint, {})
            gone = [r for r in queued if not r.active or r.generation != endpoint.generation]
            for reservation in gone:
                self._end(Ended(queued.pop(reservation)[0]))

    def _prefill(self, names: Names, what: tuple[int, Reservation, int], with_blocks: bool) -> Prefill:
        number, reservation, prompt = what
        blocks = reservation.blocks if with_blocks and self._has_room(len(reservation.blocks)) else ()
        cached = min(prompt, round(reservation.cached))
        place = names.place(reservation.endpoint)
        return Prefill(number, place, prompt, cached, reservation.cached_blocks, pack_blocks(blocks))

    def _shares(self, names: Names, endpoints: Iterable[Endpoint]) -> Iterator[Share]:
        """Yield what we have on each endpoint that is not as it was told."""
        for endpoint in endpoints:
            out, back = self._verdicts.get(endpoint, (0, 0))
            share = (
                min(MAX_REQUESTS, endpoint.in_flight - endpoint.elsewhere),
                min(MAX_TOKENS, max(0, round(endpoint.tokens - endpoint.tokens_elsewhere))),
                endpoint.on_our_trial,
                out % 65536,
                back % 65536,
            )
            if self._told.get(endpoint, (0, 0, False, 0, 0)) != share:
                self._told[endpoint] = share
                yield Share(names.place(endpoint), *share)


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    a, b, c = values
    return a, b, c


def _nobody() -> None:
    """Wake nobody: the caller asks by itself."""
