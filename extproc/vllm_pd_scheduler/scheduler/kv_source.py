"""From which instance P pulls the part of a prompt that it has not cached itself, if that pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..fleet.endpoint import Endpoint
from ..fleet.reservation import Reservation
from ..models import InstanceRole, PDInstance
from ..prediction.load_model import FleetLoad
from ..request.context import RequestContext
from .picker import Scheduler

CLEARLY = 2.0
"""How many times what a pull takes it must save: a choice, since both are predictions, and a pull also takes
of the source's memory and network."""
PAUSE_S = 60.0
"""Seconds for which nothing is pulled from a source that was asked in vain, and twice as long each further
time: one that does not answer holds P up for 30 s."""
MAX_PAUSE_S = 3600.0
LEAST_PART = 0.5
"""Of the tokens to pull that must have come, as P says, or it was in vain: a choice."""
PATIENCE_S = 2.0
"""By which a pull may exceed :data:`CLEARLY` times what P alone would have taken: more than a busy P does."""


_HOLDERS = (InstanceRole.PREFILL, InstanceRole.DECODE)


@dataclass(frozen=True, slots=True)
class KvSource:
    """An instance that has more of a prompt cached than P."""

    endpoint: Endpoint
    tokens: float
    """That P pulls, and need not compute."""
    takes: float
    """Predicted seconds of the pull."""
    saves: float
    """Predicted seconds of computing these tokens."""


def computed_blocks(endpoint: Endpoint, request: RequestContext) -> int:
    """Return the leading blocks of a prompt that are taken for cached at an endpoint, and are computed.

    A prefill's count as cached from the moment when it is sent there: too early for other instances.
    """
    depth = request.cached_blocks(endpoint.holder)
    for queued in endpoint.prefill.pending:
        if isinstance(queued, Reservation) and (at := queued.cached_blocks) < min(depth, len(queued.blocks)):
            # The blocks are chained: where one is equal, all before it are.
            depth = at if queued.blocks[at] == request.blocks[at] else depth
    return depth


def kv_source(
    prefill: Endpoint, request: RequestContext, others: Iterable[Endpoint], load: FleetLoad
) -> KvSource | None:
    """Return that of ``others`` with most of the prompt cached, if a pull from it pays clearly for P.

    It pays if computing the tokens that P would pull, as the load model predicts that of P, takes
    :data:`CLEARLY` times as long as to pull them, as was learned from the pulls of the fleet.
    """
    here = request.uncached(prefill.holder, prefill.prefill.trust)
    source, there = None, here
    for other in others:
        trust = other.prefill.trust
        if other is prefill or request.uncached(other.holder, trust) >= there:
            continue  # at best: not all of that need be there yet
        computed = trust * computed_blocks(other, request) * request.block_tokens
        uncached = max(1.0, request.prompt_tokens - computed)
        if uncached < there:
            source, there = other, uncached
    if source is None:
        return None
    cost, prompt = prefill.prefill.cost, request.prompt_tokens
    takes, saves = load.pull_time(here - there), cost(here, prompt) - cost(there, prompt)
    return KvSource(source, here - there, takes, saves) if saves >= CLEARLY * takes else None


class KvSources:
    """Finds sources in a fleet. ``can_pull`` tells which instances can pull, and be pulled from."""

    def __init__(self, scheduler: Scheduler, can_pull: Callable[[PDInstance], bool]) -> None:
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._can_pull = can_pull
        self._paused: dict[Endpoint, tuple[float, float]] = {}
        """Until when nothing is pulled from a source, and the seconds of that pause."""

    def take(self, reservation: Reservation, request: RequestContext) -> None:
        """Have the P of a reservation pull from a source, if there is one from which it pays."""
        prefill, load = reservation.endpoint, self._registry.load
        if not (request.blocks and self._can_pull(prefill.instance)):
            return
        if reservation.cost < CLEARLY * load.pull_time(0.0):
            return  # there is too little to save, whoever has it
        source = kv_source(prefill, request, self._others(prefill, request), load)
        if source is not None:
            self._registry.work.pull(reservation, request, source.endpoint, source.tokens, source.takes)

    def _others(self, prefill: Endpoint, request: RequestContext) -> list[Endpoint]:
        longest = (self._scheduler.longest_cached(role, request, prefill) for role in _HOLDERS)
        return [each for some in longest for each in some if not self._pauses(each, request.now)]

    def _pauses(self, endpoint: Endpoint, now: float) -> bool:
        return now < self._paused.get(endpoint, (0.0, 0.0))[0]

    def ended(self, reservation: Reservation, cached: int | None, now: float) -> bool:
        """Note how a prefill has ended whose P was to pull from a source; return whether it has paid.

        ``cached`` is what P says of the prompt's tokens, ``None`` if it does not. One that failed has none.
        """
        own = reservation.endpoint.prefill.trust * reservation.cached
        came = cached is None or cached - own >= LEAST_PART * reservation.pulled
        source, took = reservation.source, now - reservation.at
        if source is None:
            return True
        if came and took <= reservation.wait + CLEARLY * reservation.alone + PATIENCE_S:
            self._paused.pop(source, None)
            return True
        self._paused = {each: pause for each, pause in self._paused.items() if each in self._registry}
        pause = min(MAX_PAUSE_S, 2 * self._paused.get(source, (0.0, PAUSE_S / 2))[1])
        self._paused[source] = now + pause, pause
        return False
