"""The one mutable state: which instances there are, how they are, and what is in flight on them.

Synchronous, does no I/O, and takes every time it needs as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..models import By, InstanceRole, MetricsSnapshot, PDInstance, Place, canonical_ip, join_address
from ..prediction.load_model import DecodeLoad, FleetLoad
from ..prediction.prefill_load import PrefillLoad
from ..prediction.prefix_index import PrefixIndex
from .addresses import Addresses
from .breaker import Breaker, BreakerPolicy
from .changes import Changes
from .claims import Claims
from .elsewhere import Elsewhere, Journal
from .endpoint import Endpoint
from .ends import Ends
from .failed_transfers import FailedTransfers
from .fleet_models import FleetModels
from .learning import Learning
from .left_out import LeftOut
from .lineup import Lineup
from .pairs import Pairs
from .peers import DoubtfulEnds
from .work import Work
from .wrong_pairs import WrongPairs

__all__ = ["DuplicateInstance", "Endpoint", "HealthPolicy", "Registry", "UnknownInstance"]


class UnknownInstance(KeyError):
    """No instance has this id."""

    def __str__(self) -> str:
        return f"no instance has the id {self.args[0]!r}"


class DuplicateInstance(ValueError):
    """An id, or an address within a role, is taken already."""


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """How many probes in a row make an instance leave and return, and when failed requests do."""

    unhealthy_threshold: int = 2
    healthy_threshold: int = 1
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    max_ejected_share: float = 0.5


@dataclass(slots=True)
class Registry:
    """Instances by id. Each change of these that matters to others is told by ``changes``."""

    policy: HealthPolicy = field(default_factory=HealthPolicy)
    load: FleetLoad = field(default_factory=FleetLoad)
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    learning: Learning = field(init=False)
    wrong_pairs: WrongPairs = field(default_factory=WrongPairs)
    """The pairs of P and D that have given wrong texts."""
    pairs: Pairs = field(init=False)
    """The pairs of P and D between which hand-offs fail."""
    left_out: LeftOut = field(init=False)
    failed_transfers: FailedTransfers = field(init=False)
    elsewhere: Elsewhere = field(init=False)
    """Where what other replicas of the scheduler do is counted."""
    claims: Claims = field(default_factory=Claims)
    changes: Changes = field(init=False)
    """Tells listeners of them."""
    models: FleetModels = field(init=False)
    work: Work = field(init=False)
    ends: Ends = field(init=False)
    journal: Journal | None = None
    """Is told what we do, if there are other replicas."""
    has_ranks: bool = False
    """Whether there are instances of several endpoints."""
    trials: bool = False
    """Whether some endpoint was ejected and may be on trial."""
    on_scraped: Callable[[], None] | None = None
    """Called after each scrape."""
    _endpoints: dict[str, Endpoint] = field(default_factory=dict)
    _instances: dict[str, tuple[Endpoint, ...]] = field(default_factory=dict)
    """The endpoints of each instance, by its id: its ranks, or the one."""
    _places: dict[Place, str] = field(default_factory=dict)
    """Ids by what no two instances may share."""
    _addresses: Addresses = field(init=False)
    _watchers: dict[InstanceRole, list[set[Endpoint]]] = field(
        default_factory=lambda: {role: [] for role in InstanceRole}
    )
    _draining: tuple[Endpoint, ...] = ()
    _lineups: dict[InstanceRole, Lineup] = field(
        default_factory=lambda: {role: Lineup() for role in InstanceRole}
    )

    def __post_init__(self) -> None:
        self.learning = Learning(self.load)
        self.pairs = Pairs(self.policy.breaker, self.ranks_of)
        self.left_out = LeftOut(self.pairs, self.wrong_pairs)
        self.failed_transfers = FailedTransfers(self.pairs)
        self.elsewhere = Elsewhere(self)
        self.changes = Changes(self._refresh)
        self._addresses = Addresses(self.endpoints)
        self.models, self.work, self.ends = FleetModels(self), Work(self), Ends(self)

    def follow(self, policy: HealthPolicy) -> None:
        """Use another policy from now on."""
        self.policy = policy
        self.pairs.follow(policy.breaker)
        for endpoint in self._endpoints.values():
            endpoint.breaker.follow(policy.breaker)

    def add(self, instance: PDInstance, by: str = By.START) -> Endpoint:
        """Register an instance, or its ranks; it takes requests once a probe found it healthy.

        Return its endpoint, the first of several. Raises :exc:`DuplicateInstance` if the id, or the address
        within the role, is taken.
        """
        self.refuse_double(instance)
        size, breaker, doubts = instance.data_parallel_size, Breaker(self.policy.breaker), DoubtfulEnds()
        endpoints = tuple(
            Endpoint(
                instance,
                breaker=breaker,
                doubts=doubts,
                prefill=PrefillLoad(self.load.prefill),
                decode=DecodeLoad(self.load.decode),
                holder=self.prefixes.add(),
                watchers=self._watchers[instance.role],
                rank=rank if size > 1 else None,
            )
            for rank in range(size)
        )
        if canonical_ip(instance.host) is not None:
            self._move(endpoints, join_address(instance.host, instance.port))
        self._instances[instance.instance_id] = endpoints
        self._places[instance.place] = instance.instance_id
        for endpoint in endpoints:
            self._endpoints[endpoint.id] = endpoint
            self._addresses.added(endpoint)
            self.learning.joined(endpoint)
        self._members_changed(by, endpoints[0])
        return endpoints[0]

    def _members_changed(self, by: str, of: Endpoint | None) -> None:
        self.has_ranks = len(self._endpoints) > len(self._instances)
        self.models.changed()
        self.changes.note(by, of)

    def refuse_double(self, instance: PDInstance) -> None:
        """Raise :exc:`DuplicateInstance` if an instance cannot be added."""
        if instance.instance_id in self._instances or instance.instance_id in self._endpoints:
            raise DuplicateInstance(f"the id {instance.instance_id!r} is taken")
        if (other := self._places.get(instance.place)) is not None:
            raise DuplicateInstance(
                f"{join_address(instance.host, instance.port)} is already the {instance.role} "
                f"instance {other!r}"
            )

    def remove(self, instance_id: str, by: str = By.START) -> Endpoint:
        """Forget an instance. Requests in flight on it go on; their reservations stay valid."""
        endpoints = self.ranks_of(self.get(instance_id))
        instance = endpoints[0].instance
        del self._instances[instance.instance_id]
        del self._places[instance.place]
        for endpoint in endpoints:
            del self._endpoints[endpoint.id]
            self._addresses.removed(endpoint)
            self.learning.left(endpoint)
            self._forget_pairs(endpoint)
            self.load.transfers.forget(endpoint.id)
            endpoint.drain(True)
            endpoint.holder.close()
        self._members_changed(by, endpoints[0] if len(endpoints) == 1 else None)
        return endpoints[0]

    def _forget_pairs(self, endpoint: Endpoint) -> None:
        self.wrong_pairs.forget(endpoint)
        self.pairs.forget(endpoint)
        self.failed_transfers.forget(endpoint)

    def describe(self, instance_id: str, instance: PDInstance, by: str = By.START) -> None:
        """Change how an instance is described: its key, TLS name, models or revision.

        Its id, role, place and number of ranks stay.
        """
        first = self.get(instance_id)
        for endpoint in self.ranks_of(first):
            endpoint.described(instance)
        self.models.changed()
        self.changes.note(by, first)

    def drain(self, instance_id: str, by: str = By.START) -> Endpoint:
        """Send nothing new to an instance, to none of its ranks."""
        return self._drain(instance_id, True, by)

    def undrain(self, instance_id: str, by: str = By.START) -> Endpoint:
        """Let an instance take requests again, as soon as its health allows."""
        return self._drain(instance_id, False, by)

    def _drain(self, instance_id: str, draining: bool, by: str) -> Endpoint:
        endpoint = self.get(instance_id)
        changed = [each.drain(draining) for each in self.ranks_of(endpoint)]
        if any(changed):
            self.changes.note(by, endpoint)
        return endpoint

    def drained(self, instance_id: str) -> bool:
        """Whether an instance is draining and nothing is left on any of its ranks."""
        return all(each.drained for each in self.ranks_of(self.get(instance_id)))

    def get(self, endpoint_id: str) -> Endpoint:
        """Return the endpoint with this id; with that of an instance, the first of its ranks.

        Raises :exc:`UnknownInstance`.
        """
        found = self._endpoints.get(endpoint_id)
        if found is None and endpoint_id in self._instances:
            found = self._instances[endpoint_id][0]
        if found is None:
            raise UnknownInstance(endpoint_id)
        return found

    def find(self, endpoint_id: str) -> Endpoint | None:
        """Return the endpoint that :meth:`get` does; ``None`` if there is none."""
        return self._endpoints.get(endpoint_id) or (self._instances.get(endpoint_id) or (None,))[0]

    def ranks_of(self, endpoint: Endpoint) -> tuple[Endpoint, ...]:
        """Return all endpoints of an endpoint's process, of which it is one: its ranks, or itself."""
        if endpoint.rank is None:
            return (endpoint,)
        found = self._instances.get(endpoint.instance.instance_id, ())
        return found if endpoint in found else (endpoint,)  # it was removed, and another one has its id

    def instances(self) -> list[tuple[Endpoint, ...]]:
        """Return the endpoints of each instance, in the order in which these were added."""
        return list(self._instances.values())

    def __contains__(self, endpoint: object) -> bool:
        return isinstance(endpoint, Endpoint) and self._endpoints.get(endpoint.id) is endpoint

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(tuple(self._endpoints.values()))

    def endpoints(self, role: InstanceRole | None = None) -> list[Endpoint]:
        """All endpoints, or those of one role, in the order they were added."""
        return [e for e in self._endpoints.values() if role is None or e.instance.role is role]

    def lineup(self, role: InstanceRole) -> Lineup:
        """Return who of a role can serve, for those who look often: it stays the same object."""
        return self._lineups[role]

    def routable(self, role: InstanceRole) -> tuple[Endpoint, ...]:
        """Endpoints of a role that can take a new request now, in the order they were added."""
        return self._lineups[role].routable

    def ejected(self, role: InstanceRole) -> tuple[Endpoint, ...]:
        """Endpoints of a role that only their breakers keep from being routable: the last resort."""
        return self._lineups[role].ejected

    def out_of_service(self, role: InstanceRole) -> tuple[tuple[Endpoint, str], ...]:
        """Endpoints of a role that are not routable, with their states; a new tuple after each change."""
        return self._lineups[role].out_of_service

    def tell_drained(self) -> None:
        """Tell the listeners if the last that was left on an instance which drains has ended.

        Whoever ends something calls it, but not at once: a request may go on with what P holds for it.
        """
        if self._draining:
            ended = [endpoint for endpoint in self._draining if endpoint.drain_ended()]
            if ended:
                self.changes.note(By.REQUEST, ended[0])

    def watch(self, role: InstanceRole, changed: set[Endpoint] | None = None) -> set[Endpoint]:
        """Return a set to which each endpoint of a role is added when its load changes.

        It is ``changed``, or a new one. A load changes when a request is reserved or released there, when it
        is scraped, and when it says that it is full. The caller empties the set, and so need not look at all
        endpoints to see what has changed.
        """
        changed = set() if changed is None else changed
        self._watchers[role].append(changed)
        return changed

    def resolved(self, endpoint: Endpoint, ip: str, now: float = 0.0) -> None:
        """Record the IP address behind an instance's DNS name, as it was found at a time."""
        endpoints = self.ranks_of(endpoint)
        for each in endpoints:
            each.resolved(now)
        address = join_address(ip, endpoint.instance.port)
        if endpoint.address != address:
            self._move(endpoints, address)
            self._addresses.moved(endpoint.instance.role)
            self.changes.note(By.PROBE, endpoint)

    def probed(self, endpoint: Endpoint, problem: str | None, now: float = 0.0) -> None:
        """Record a health probe: ``None`` is success, else the reason for people.

        The first probe decides alone; later ones need the policy's thresholds. A success also gives an
        ejected instance a trial, once its pause is over.
        """
        policy, ok = self.policy, problem is None
        self.tell_drained()
        revived = ok and endpoint.breaker.probed(now)
        threshold = policy.healthy_threshold if ok else policy.unhealthy_threshold
        changed = [each.probes.found(problem, threshold) for each in self.ranks_of(endpoint)]
        if any(changed) or revived:
            self.changes.note(By.PROBE, endpoint)

    def scraped(
        self,
        endpoint: Endpoint,
        snapshot: MetricsSnapshot,
        in_flight_at_scrape: int,
        tokens_at_scrape: float = 0.0,
    ) -> None:
        """Record a scrape, and what of ours was there when it was asked for: requests and their tokens."""
        before = endpoint.metrics
        endpoint.scraped(snapshot, in_flight_at_scrape, tokens_at_scrape)
        for adapter in snapshot.adapters:
            self.models.adapter_used(endpoint, adapter)
        self.learning.scraped(endpoint, before, snapshot)
        if snapshot.failed_transfers is not None and endpoint.instance.role is InstanceRole.DECODE:
            self.failed_transfers.scraped(endpoint, snapshot.failed_transfers, snapshot.taken_at)
        if self.journal is not None:
            self.elsewhere.scraped(endpoint)
        if self.on_scraped is not None:
            self.on_scraped()

    def _move(self, endpoints: tuple[Endpoint, ...], address: str) -> None:
        """Set the address of an instance's endpoints. Those at one are one server, and have one breaker."""
        first, breaker = self.at(endpoints[0].instance.role, address), endpoints[0].breaker
        if first is not None:
            breaker = first.breaker
        elif any(e.breaker is breaker for e in self._endpoints.values() if e not in endpoints):
            breaker = Breaker(self.policy.breaker)
        for endpoint in endpoints:
            endpoint.move(address, breaker)

    def forget_metrics(self, endpoint: Endpoint) -> None:
        """Record that an instance has not been scraped for too long: its load is not known any more."""
        for each in self.ranks_of(endpoint):
            each.forget_metrics()

    def speaks(self, endpoint: Endpoint, protocol: str, takes_token_ids: bool) -> None:
        """Record what a P's hand-off shows: its protocol, empty if its connector does not find that out."""
        if endpoint.spoken.shown(protocol, takes_token_ids):
            self.changes.note(By.REQUEST, endpoint)

    def at(self, role: InstanceRole, address: str) -> Endpoint | None:
        """Return the endpoint of a role at an ``ip:port``, if there is one: of several the first added."""
        return next(iter(self._addresses.at(role, address)), None)

    def started(self, endpoint: Endpoint, started_at: float | None) -> bool:
        """Record when an instance's process was started; return whether it is another one than before.

        A restarted instance has none of the requests, and none of the failures, of the one before.
        """
        restarted = [each.started(started_at) for each in self.ranks_of(endpoint)]
        if not any(restarted):
            return False
        for each in self.ranks_of(endpoint):
            self._forget_pairs(each)
        self.models.changed()  # what it listed counts no more
        self.changes.note(By.PROBE, endpoint)
        return True

    def _refresh(self, of: Endpoint | None) -> Endpoint | None:
        """See who can serve after a change. Return who has changed; ``None`` if others may have too."""
        if of is None or not self._look_at(of):
            of = None
            for role, lineup in self._lineups.items():
                lineup.look_at_all(self.endpoints(role))
        lineups = self._lineups.values()
        for lineup in lineups:  # also those of the other roles: P and D are paired
            lineup.line_up()
        self._draining = tuple(each for lineup in lineups for each in lineup.draining)
        self.trials = any(lineup.trials for lineup in lineups)
        return of

    def _look_at(self, changed: Endpoint) -> bool:
        """See whether an endpoint can serve, and its ranks; return ``False`` if all must be looked at."""
        ranks, role = self.ranks_of(changed), changed.instance.role
        neighbours = self._addresses.at(role, changed.address)
        if any(each.breaker is changed.breaker and each not in ranks for each in neighbours):
            return False
        if any(lineup.drains_have_ended(ranks) for lineup in self._lineups.values()):
            return False
        return self._lineups[role].look_at(ranks, there=changed in self)
