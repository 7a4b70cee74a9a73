"""The schedulers of a replay: one, or several replicas that tell each other what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from ..admission.dispatcher import Dispatcher
from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import PD_ROLES, InstanceRole
from ..replicas import FleetKey, Replica
from ..scheduler import Scheduler
from ..scheduler.disaggregation import Disaggregation
from ..sim.virtual import Handle, Snapshot, VirtualClock
from .peers import PEERS
from .variant import Sharing, Variant

_FLEET = FleetKey("replay")

FOREIGN = "least_load"
"""The strategy of the other router, where a part of the load is another's."""


@dataclass(slots=True, eq=False)
class OneScheduler:
    """A scheduler with all that it knows."""

    registry: Registry
    scheduler: Scheduler
    dispatcher: Dispatcher
    disaggregation: Disaggregation
    scraped: dict[Endpoint, Snapshot] = field(default_factory=dict)
    """What it read last of each instance."""
    wake_up: Handle | None = None
    """When it looks again at the requests that wait."""
    replica: Replica | None = None
    """What it knows of the others, if they tell."""
    publishes: tuple[float, Handle] | None = None
    alive: bool = True
    asked: bool = True
    """Whether Envoys send it requests."""

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests in its queue, for P and for D."""
        queue = self.dispatcher.queue
        return queue.waiting(InstanceRole.PREFILL), queue.waiting(InstanceRole.DECODE)

    def die(self) -> None:
        """Do nothing more."""
        self.alive = False
        for handle in (self.wake_up, self.publishes and self.publishes[1]):
            if handle is not None:
                handle.cancel()

    def leave(self) -> None:
        """Be asked no more."""
        self.asked = False

    def join(self) -> None:
        """Begin to serve."""
        self.alive = self.asked = True


def make_schedulers(variant: Variant, config: SchedulerConfig, seed: int) -> list[OneScheduler]:
    """Return the schedulers of a variant, which know no instance yet.

    The last one is not there yet if one is to join.
    """
    count, joins = variant.sharing.replicas, variant.sharing.joins is not None
    found = [_make(variant, config, seed, number) for number in range(count + joins)]
    if joins:
        found[-1].alive = found[-1].asked = False
    return found


def make_foreign(seed: int) -> OneScheduler:
    """Return a scheduler that neither tells the others anything nor hears of them: another router's."""
    variant = Variant(FOREIGN, FOREIGN)
    return _make(variant, variant.config(), seed, 0)


def _make(variant: Variant, config: SchedulerConfig, seed: int, number: int) -> OneScheduler:
    registry = Registry()
    scheduler = Scheduler(config, registry, seed=seed + number)
    if variant.strategy in PEERS:
        for role in PD_ROLES:
            scheduler.strategies.install(PEERS[variant.strategy], role, variant.strategy)
    one = OneScheduler(registry, scheduler, Dispatcher(scheduler), Disaggregation(config, scheduler))
    if variant.sharing.replicas > 1 and variant.sharing.delay is not None:
        one.replica = Replica(registry, f"scheduler-{number}", _FLEET)
    return one


class Network:
    """Carries messages between schedulers in virtual time, late, and loses some."""

    def __init__(
        self,
        clock: VirtualClock,
        sharing: Sharing,
        schedulers: Sequence[OneScheduler],
        random: Random,
        on_news: Callable[[OneScheduler], None],
    ) -> None:
        self._clock, self._schedulers, self._random, self._on_news = clock, schedulers, random, on_news
        self._delay, self._loss = sharing.delay or 0.0, sharing.loss
        self._stopped = False

    def introduce(self) -> None:
        """Have all know each other, as schedulers do that are ready before the first request comes."""
        now = self._clock.now
        for one in self._schedulers:
            for data in one.replica.publish(now) if one.alive and one.replica is not None else ():
                for other in self._schedulers:
                    if other is not one:
                        self._deliver(other, data)
            self.publish_soon(one)

    def stop(self) -> None:
        """Send nothing more."""
        self._stopped = True

    def publish_soon(self, one: OneScheduler) -> None:
        """Have a scheduler tell what it did, as soon as it may."""
        if one.replica is None or not one.alive or self._stopped:
            return
        at = one.replica.next_publish(self._clock.now)
        if one.publishes is not None:
            if one.publishes[0] <= at:
                return
            one.publishes[1].cancel()
        one.publishes = at, self._clock.call_at(at, partial(self._publish, one))

    def _publish(self, one: OneScheduler) -> None:
        one.publishes, now = None, self._clock.now
        if one.replica is None or self._stopped:
            return
        for data in one.replica.publish(now, one.waiting):
            for other in self._schedulers:
                if other is not one and self._random.random() >= self._loss:
                    self._clock.call_at(now + self._delay, partial(self._deliver, other, data))
        self.publish_soon(one)

    def _deliver(self, one: OneScheduler, data: bytes) -> None:
        if one.replica is not None and one.alive:
            one.replica.receive(data, self._clock.now)
            self._on_news(one)
