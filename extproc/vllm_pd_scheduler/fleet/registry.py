"""The one mutable state: which instances there are, how they are, and what is in flight on them.

Synchronous, does no I/O, and takes every time it needs as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from ..models import By, InstanceRole, InstanceState, MetricsSnapshot, PDInstance, canonical_ip, join_address
from ..prediction.load_model import DecodeLoad, FleetLoad, PrefillLoad
from ..prediction.prefix_index import PrefixIndex
from ..request.context import RequestContext
from .breaker import Breaker, BreakerPolicy, BreakerState
from .claims import Claims
from .elsewhere import Elsewhere, Journal
from .endpoint import Endpoint, Reservation
from .failed_transfers import FailedTransfers
from .learning import Learning
from .left_out import LeftOut
from .pairs import Pairs
from .peers import DoubtfulEnds
from .wrong_pairs import WrongPairs

__all__ = ["DuplicateInstance", "Endpoint", "HealthPolicy", "Registry", "Reservation", "UnknownInstance"]


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
    """Instances by id. Listeners are called after a change in who there is or who can serve."""

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
    claims: Claims = field(default_factory=Claims)
    """Where what other replicas of the scheduler do is counted."""
    journal: Journal | None = None
    """Is told what we do, if there are other replicas."""
    busy_until: float = 0.0
    """Until when some endpoint is left alone because it said that it is full."""
    models_version: int = 0
    """Changes when an instance serves other models than before, and when there are others than before."""
    adapters_version: int = 0
    """Changes when other LoRA adapters are loaded on an instance than before."""
    cards: dict[str, bytes] = field(default_factory=dict)
    """By name, what an instance that lists a model says of it: JSON."""
    has_ranks: bool = False
    """Whether there are instances of several endpoints."""
    trials: bool = False
    """Whether some endpoint was ejected and may be on trial."""
    changed_by: str = By.START
    """Who caused the change of which the listeners are told."""
    on_scraped: Callable[[], None] | None = None
    """Called after each scrape."""
    _endpoints: dict[str, Endpoint] = field(default_factory=dict)
    _instances: dict[str, tuple[Endpoint, ...]] = field(default_factory=dict)
    """The endpoints of each instance, by its id: its ranks, or the one."""
    _places: dict[tuple[InstanceRole, str, int], str] = field(default_factory=dict)
    """Ids by what no two instances may share."""
    _changes: int = 0
    """How many there were."""
    _held_back: bool = False
    """Whether the listeners are told later, of all changes at once."""
    _by_address: dict[InstanceRole, dict[str, Endpoint]] = field(
        default_factory=lambda: {role: {} for role in InstanceRole}
    )
    _watchers: dict[InstanceRole, list[set[Endpoint]]] = field(
        default_factory=lambda: {role: [] for role in InstanceRole}
    )
    _draining: tuple[Endpoint, ...] = ()
    _listeners: list[Callable[[], None]] = field(default_factory=list)
    _routable: dict[InstanceRole, tuple[Endpoint, ...]] = field(
        default_factory=lambda: dict.fromkeys(InstanceRole, ())
    )
    _ejected: dict[InstanceRole, tuple[Endpoint, ...]] = field(
        default_factory=lambda: dict.fromkeys(InstanceRole, ())
    )

    _out_of_service: dict[InstanceRole, tuple[tuple[Endpoint, str], ...]] = field(
        default_factory=lambda: dict.fromkeys(InstanceRole, ())
    )

    def __post_init__(self) -> None:
        self.learning = Learning(self.load)
        self.pairs = Pairs(self.policy.breaker, self.ranks_of)
        self.left_out = LeftOut(self.pairs, self.wrong_pairs)
        self.failed_transfers = FailedTransfers(self.pairs)
        self.elsewhere = Elsewhere(self)

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
        self._places[_place(instance)] = instance.instance_id
        for endpoint in endpoints:
            self._endpoints[endpoint.id] = endpoint
            self.learning.joined(endpoint)
        self._members_changed(by)
        return endpoints[0]

    def _members_changed(self, by: str) -> None:
        self.has_ranks = len(self._endpoints) > len(self._instances)
        self.models_version += 1
        self._changed(by)

    def refuse_double(self, instance: PDInstance) -> None:
        """Raise :exc:`DuplicateInstance` if an instance cannot be added."""
        if instance.instance_id in self._instances or instance.instance_id in self._endpoints:
            raise DuplicateInstance(f"the id {instance.instance_id!r} is taken")
        if (other := self._places.get(_place(instance))) is not None:
            raise DuplicateInstance(
                f"{join_address(instance.host, instance.port)} is already the {instance.role} "
                f"instance {other!r}"
            )

    def remove(self, instance_id: str, by: str = By.START) -> Endpoint:
        """Forget an instance. Requests in flight on it go on; their reservations stay valid."""
        endpoints = self.ranks_of(self.get(instance_id))
        instance = endpoints[0].instance
        del self._instances[instance.instance_id]
        del self._places[_place(instance)]
        for endpoint in endpoints:
            del self._endpoints[endpoint.id]
            self.learning.left(endpoint)
            self._forget_pairs(endpoint)
            self.load.transfers.forget(endpoint.id)
            endpoint.drain(True)
            endpoint.holder.close()
        self._members_changed(by)
        return endpoints[0]

    def _forget_pairs(self, endpoint: Endpoint) -> None:
        self.wrong_pairs.forget(endpoint)
        self.pairs.forget(endpoint)
        self.failed_transfers.forget(endpoint)

    def describe(self, instance_id: str, instance: PDInstance, by: str = By.START) -> None:
        """Change how an instance is described: its key, TLS name, models or revision.

        Its id, role, place and number of ranks stay.
        """
        for endpoint in self.ranks_of(self.get(instance_id)):
            endpoint.described(instance)
        self.models_version += 1
        self._changed(by)

    @contextmanager
    def as_one_change(self, by: str) -> Iterator[None]:
        """Tell the listeners only at the end, once, of all changes that are made meanwhile."""
        if self._held_back:
            yield
            return
        self._held_back, version = True, self._changes
        try:
            yield
        finally:
            self._held_back = False
            if self._changes != version:
                self._changed(by)

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
            self._changed(by)
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

    def routable(self, role: InstanceRole) -> tuple[Endpoint, ...]:
        """Endpoints of a role that can take a new request now, in the order they were added."""
        return self._routable[role]

    def ejected(self, role: InstanceRole) -> tuple[Endpoint, ...]:
        """Endpoints of a role that only their breakers keep from being routable: the last resort."""
        return self._ejected[role]

    def out_of_service(self, role: InstanceRole) -> tuple[tuple[Endpoint, str], ...]:
        """Endpoints of a role that are not routable, with their states; a new tuple after each change."""
        return self._out_of_service[role]

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after each change in membership, address, health or draining.

        The end of a drain is told by :meth:`tell_drained`.
        """
        self._listeners.append(listener)

    def tell(self, by: str | None = None) -> None:
        """Tell the listeners that something has changed of which this does not know."""
        self._changed(self.changed_by if by is None else by)

    def tell_drained(self) -> None:
        """Tell the listeners if the last that was left on an instance which drains has ended.

        Whoever ends something calls it, but not at once: a request may go on with what P holds for it.
        """
        if [endpoint for endpoint in self._draining if endpoint.drain_ended()]:
            self._changed(By.REQUEST)

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
            self._changed(By.PROBE)

    def probed(self, endpoint: Endpoint, problem: str | None, now: float = 0.0) -> None:
        """Record a health probe: ``None`` is success, else the reason for people.

        The first probe decides alone; later ones need the policy's thresholds. A success also gives an
        ejected instance a trial, once its pause is over.
        """
        policy, ok = self.policy, problem is None
        self.tell_drained()
        revived = ok and endpoint.breaker.probed(now)
        threshold = policy.healthy_threshold if ok else policy.unhealthy_threshold
        changed = [each.probed(problem, threshold) for each in self.ranks_of(endpoint)]
        if any(changed) or revived:
            self._changed(By.PROBE)

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
            self._adapter_used(endpoint, adapter)
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

    def serves(
        self,
        endpoint: Endpoint,
        models: frozenset[str] | None,
        adapters: frozenset[str] = frozenset(),
        cards: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Record which models an instance lists; ``None``: it has not said so for too long.

        ``adapters`` are those of them that are LoRA adapters, ``cards`` is what it says of each.
        """
        self.cards.update(cards)
        changed = [each.lists(models, adapters) for each in self.ranks_of(endpoint)]
        if any(changed):
            self.models_version += 1
            self.adapters_version += 1
            if len(self.cards) > len(cards):
                self._drop_cards()

    def _drop_cards(self) -> None:
        """Forget what was said of models that nobody lists any more."""
        listed = frozenset[str]().union(*(e.listed for e in self._endpoints.values() if e.listed))
        self.cards = {name: card for name, card in self.cards.items() if name in listed}

    def _adapter_used(self, endpoint: Endpoint, name: str) -> None:
        if name in endpoint.adapters and endpoint.adapter_used(name):
            self.adapters_version += 1

    def reserve(
        self, endpoint: Endpoint, request: RequestContext | None = None, *, tentative: bool = False
    ) -> Reservation:
        """Count a request on an endpoint from now on (``request.now``), with the work that it brings.

        A ``tentative`` one is to be confirmed, or released.
        """
        reservation = Reservation(endpoint, endpoint.generation, tentative=tentative)
        if request is not None:
            self.learning.weigh(reservation, request)  # what fails, fails before anything is counted
        endpoint.take(reservation)
        if self.trials and endpoint.rank is not None:
            for sibling in self.ranks_of(endpoint):
                sibling.joins_trial(endpoint)
        if request is not None:
            if endpoint.adapters and request.model is not None:
                self._adapter_used(endpoint, request.model)
            if request.blocks and not tentative:
                endpoint.holder.store(request.blocks)
            if endpoint.instance.role is InstanceRole.PREFILL:
                endpoint.prefill.enqueue(reservation, reservation.cost, request.now, is_sent=not tentative)
                if self.pairs.in_doubt:
                    self.pairs.tried(endpoint, None, reservation)
            if self.journal is not None:
                self.journal.reserved(reservation, request)
        return reservation

    def confirm(self, reservation: Reservation, now: float) -> None:
        """Let a request stay where it is, and go there now: its prompt will be cached there."""
        reservation.tentative = False
        reservation.endpoint.prefill.sent(reservation, now)
        if reservation.blocks:
            reservation.endpoint.holder.store(reservation.blocks)
        if self.journal is not None:
            self.journal.confirmed(reservation)

    def pull(
        self, reservation: Reservation, request: RequestContext, source: Endpoint, tokens: float, takes: float
    ) -> None:
        """Have P pull prompt tokens from a source, in ``takes`` predicted seconds, and not compute them."""
        endpoint = reservation.endpoint
        if not reservation.stands:
            return
        before = reservation.tokens
        self.learning.weigh_pull(reservation, request, source, tokens, takes)
        endpoint.recount(reservation.tokens - before)
        endpoint.prefill.recost(reservation, reservation.cost)

    def move(self, reservation: Reservation, endpoint: Endpoint) -> Reservation:
        """End a claim, and make one with as many tokens on another endpoint, where the request is now."""
        reservation.release()
        moved = Reservation(endpoint, endpoint.generation, reservation.tokens)
        endpoint.take(moved)
        return moved

    def prefilled(
        self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None, now: float
    ) -> None:
        """End a claim on prefill with what the instance says it read, and learn from how long it took.

        ``cached_tokens`` is ``None`` if it does not say; then what was predicted is taken for true.
        """
        seconds = reservation.finish(now)
        if seconds is not None:
            reservation.endpoint.prefill.computed(seconds)
            self.learning.prefilled(reservation, prompt_tokens, cached_tokens, seconds)
            if self.journal is not None:
                self.journal.prefilled(reservation, prompt_tokens, cached_tokens)

    def answered(
        self, endpoint: Endpoint, blocks: Sequence[int], block_tokens: float, prompt: float, answer: float
    ) -> None:
        """Note that D has in its cache the answer of so many tokens to a prompt with these blocks.

        ``block_tokens`` may be estimated: a prompt has room for all of its blocks, and for no further one.
        The last token of an answer is not cached, since nothing was computed from it.
        """
        if blocks:
            known = len(blocks)
            size = max(1.0, prompt / (known + 1), min(block_tokens, prompt / known))
            endpoint.holder.answered(blocks, int((prompt + answer - 1) / size) - known)

    def succeeded(self, endpoint: Endpoint, handed_over_by: Endpoint | None = None) -> None:
        """Record a request that an instance served: a D maybe with what a P has handed over."""
        endpoint.served()
        self.pairs.served(handed_over_by, endpoint)
        if handed_over_by is not None and not self.failed_transfers.fail_at(endpoint):
            self.pairs.succeeded(handed_over_by, endpoint)
        if endpoint.breaker.succeeded():
            if self.journal is not None:
                self.journal.recovered(endpoint)
            self._changed(By.REQUEST)

    def handed_over(self, prefill: Endpoint, decode: Endpoint) -> None:
        """Record that what a P holds is on its way to a D."""
        if prefill in self:
            first = self.ranks_of(prefill)[0]
            if self.failed_transfers.handed_over(first, decode) and self.journal is not None:
                self.journal.handed_over(first, decode)

    def speaks(self, endpoint: Endpoint, protocol: str, takes_token_ids: bool) -> None:
        """Record what a P's hand-off shows: its protocol, empty if its connector does not find that out."""
        if endpoint.speaks_now(protocol, takes_token_ids):
            self._changed(By.REQUEST)

    def failed(
        self, endpoint: Endpoint, reason: str, now: float, handed_over_by: Endpoint | None = None
    ) -> None:
        """Record a request that an instance failed; it may be ejected for that.

        If all that it has failed in a row was ``handed_over_by`` one and the same P, and it serves others,
        that pair is left out in its place (see :mod:`.pairs`). If that P is gone, it may be the reason, and
        the end is doubtful.

        No more than ``max_ejected_share`` of a role is out at once, so that a fault they share (a bad
        client, a broken model) does not end all service; an instance on trial goes out in any case.
        """
        if handed_over_by is not None and handed_over_by not in self:
            self.doubtful(endpoint, reason, now)
            return
        decode = endpoint.instance.role is InstanceRole.DECODE
        if decode and endpoint in self:
            self.pairs.failed(handed_over_by, endpoint, now)
        if endpoint.breaker.failed() and not (decode and self.pairs.explain(endpoint)):
            self._eject_by_us(endpoint, reason, now)

    def errored(
        self,
        endpoint: Endpoint,
        before: Sequence[Endpoint],
        reason: str,
        now: float,
        handed_over_by: Endpoint | None = None,
    ) -> None:
        """Record a 500 for a request to which those ``before`` have answered 500 too.

        The first is a failure. With a second it may be the request's fault: then the failure is taken back,
        and what happened is doubtful for all. ``handed_over_by`` is the P whose hand-off the first had.
        """
        if not before:
            self.failed(endpoint, reason, now, handed_over_by)
            return
        if len(before) == 1:
            if handed_over_by is not None:
                self.pairs.forgive(handed_over_by, before[0])
            if before[0].breaker.forgive():
                self._changed(By.REQUEST)
            self.doubtful(before[0], reason, now)
        self.doubtful(endpoint, reason, now)

    def doubtful(self, endpoint: Endpoint, reason: str, now: float) -> None:
        """Record a request whose end says something of the instance only beside those of its peers.

        The instance is ejected if it has many of them and its peers have few. A trial stays undecided.
        """
        endpoint.doubts.doubtful()
        if self._odd(endpoint):
            self._eject_by_us(endpoint, f"{reason}, where others of its role serve", now)

    def stands_out(self, endpoint: Endpoint) -> bool:
        """Whether an instance, and not the fleet, is the reason for what happens there.

        It is unhealthy or ejected, or has many doubtful ends where its peers have few.
        """
        return endpoint.state is InstanceState.UNHEALTHY or self._odd(endpoint)

    def _odd(self, endpoint: Endpoint) -> bool:
        own = endpoint.doubts
        return own.odd_among(e.doubts for e in self._routable[endpoint.instance.role] if e.doubts is not own)

    def overloaded(self, endpoint: Endpoint, now: float, retry_after: float | None = None) -> None:
        """Record that an instance is full: neither its failure nor a success.

        It is left alone for as long as it asks (``retry_after``, seconds), else for half a second, twice
        as long each time until it serves a request again.
        """
        endpoint.say_full(now, retry_after)
        self.busy_until = max(self.busy_until, endpoint.busy_until)

    def _eject_by_us(self, endpoint: Endpoint, reason: str, now: float) -> None:
        if self.eject(endpoint, reason, now) and self.journal is not None:
            self.journal.ejected(endpoint)

    def eject(self, endpoint: Endpoint, reason: str, now: float) -> bool:
        """Eject an instance unless too many of its role are out; return whether it is out since now."""
        if endpoint.breaker.state is BreakerState.OPEN:
            return False
        breaker = endpoint.breaker
        servers = {id(e.breaker): e.breaker for e in self.endpoints(endpoint.instance.role)}
        out = sum(each is breaker or each.state is not BreakerState.CLOSED for each in servers.values())
        if allowed := out <= self.policy.max_ejected_share * len(servers):
            for each in self.ranks_of(endpoint):
                each.ejected_because(reason)
                self.pairs.ejected(each)
            breaker.open(now)
            self._changed(By.REQUEST)
        return allowed

    def at(self, role: InstanceRole, address: str) -> Endpoint | None:
        """Return the endpoint of a role at an ``ip:port``, if there is one: of several the first added."""
        return self._by_address[role].get(address)

    def started(self, endpoint: Endpoint, started_at: float | None) -> bool:
        """Record when an instance's process was started; return whether it is another one than before.

        A restarted instance has none of the requests, and none of the failures, of the one before.
        """
        restarted = [each.started(started_at) for each in self.ranks_of(endpoint)]
        if not any(restarted):
            return False
        for each in self.ranks_of(endpoint):
            self._forget_pairs(each)
        self.models_version += 1  # what it listed counts no more
        self._changed(By.PROBE)
        return True

    def _changed(self, by: str) -> None:
        self._changes += 1
        if self._held_back:
            return
        self.changed_by = by
        for role in InstanceRole:
            endpoints = self.endpoints(role)
            if not any(e.routable for e in endpoints):
                for endpoint in endpoints:  # one that fails now and then is better than none
                    endpoint.breaker.readmit()
            self._routable[role] = tuple(e for e in endpoints if e.routable)
            self._ejected[role] = tuple(e for e in endpoints if e.ejected)
            self._out_of_service[role] = tuple((e, e.shown_state) for e in endpoints if not e.routable)
            self._by_address[role] = {e.address: e for e in reversed(endpoints) if e.address is not None}
        self._draining = tuple(e for e in self._endpoints.values() if e.draining)
        self.trials = any(e.breaker.state is not BreakerState.CLOSED for e in self._endpoints.values())
        for listener in self._listeners:
            listener()


def _place(instance: PDInstance) -> tuple[InstanceRole, str, int]:
    """Return what no two instances may share. A final dot makes no other name of it."""
    return instance.role, instance.host.removesuffix("."), instance.port
