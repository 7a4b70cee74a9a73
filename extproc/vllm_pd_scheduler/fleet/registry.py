"""The one mutable state: which instances there are, how they are, and what is in flight on them.

Synchronous, does no I/O, and takes every time it needs as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..models import By, InstanceRole, InstanceState, MetricsSnapshot, PDInstance, canonical_ip, join_address
from ..prediction.load_model import DecodeLoad, FleetLoad, PrefillLoad
from ..prediction.prefix_index import PrefixIndex
from ..request.context import RequestContext
from .breaker import Breaker, BreakerPolicy, BreakerState
from .endpoint import Endpoint, Reservation
from .peers import DoubtfulEnds

__all__ = ["DuplicateInstance", "Endpoint", "HealthPolicy", "Registry", "Reservation", "UnknownInstance"]


_LEAST_BLOCK_TOKENS = 16.0
"""A client can send one token id of a megabyte; no real prompt has so few tokens in a block."""
BUSY_PAUSE_S = 0.5
"""Seconds for which an instance that is full is left alone at first: a slot comes free about so soon."""
MAX_BUSY_PAUSE_S = 15.0
"""And at most: it may be free long before."""
_MOST_BLOCKS = 1 << 20
"""Of the prefixes of one instance that are remembered, whatever it says of its cache."""
_RECENT = 0.1
"""Weight of the newest request in running means."""


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
    block_tokens: float = 256.0
    """Tokens of one block of the prefix index, on average over recent requests."""
    busy_until: float = 0.0
    """Until when some endpoint is left alone because it said that it is full."""
    models_version: int = 0
    """Changes when an instance serves other models than before."""
    trials: bool = False
    """Whether some endpoint was ejected and may be on trial."""
    changed_by: str = By.START
    """Who caused the change of which the listeners are told."""
    on_scraped: Callable[[], None] | None = None
    """Called after each scrape."""
    _endpoints: dict[str, Endpoint] = field(default_factory=dict)
    _untried: dict[InstanceRole, set[Endpoint]] = field(
        default_factory=lambda: {role: set() for role in InstanceRole}
    )
    """Those of which the load model has measured nothing yet."""
    _by_address: dict[InstanceRole, dict[str, Endpoint]] = field(
        default_factory=lambda: {role: {} for role in InstanceRole}
    )
    _watchers: dict[InstanceRole, list[set[Endpoint]]] = field(
        default_factory=lambda: {role: [] for role in InstanceRole}
    )
    _listeners: list[Callable[[], None]] = field(default_factory=list)
    _routable: dict[InstanceRole, tuple[Endpoint, ...]] = field(
        default_factory=lambda: dict.fromkeys(InstanceRole, ())
    )
    _ejected: dict[InstanceRole, tuple[Endpoint, ...]] = field(
        default_factory=lambda: dict.fromkeys(InstanceRole, ())
    )

    def add(self, instance: PDInstance, by: str = By.START) -> Endpoint:
        """Register an instance; it takes requests once a probe found it healthy.

        Raises :exc:`DuplicateInstance` if the id, or the address within the role, is taken.
        """
        self.refuse_double(instance)
        endpoint = Endpoint(
            instance,
            breaker=Breaker(self.policy.breaker),
            prefill=PrefillLoad(self.load.prefill),
            decode=DecodeLoad(self.load.decode),
            holder=self.prefixes.add(),
            watchers=self._watchers[instance.role],
        )
        if canonical_ip(instance.host) is not None:
            self._move(endpoint, join_address(instance.host, instance.port))
        self._endpoints[instance.instance_id] = endpoint
        self._untried[instance.role].add(endpoint)
        self._changed(by)
        return endpoint

    def refuse_double(self, instance: PDInstance) -> None:
        """Raise :exc:`DuplicateInstance` if an instance cannot be added."""
        if instance.instance_id in self._endpoints:
            raise DuplicateInstance(f"the id {instance.instance_id!r} is taken")
        for other in self._endpoints.values():
            if _place(other.instance) == _place(instance):
                raise DuplicateInstance(
                    f"{join_address(instance.host, instance.port)} is already the {instance.role} "
                    f"instance {other.id!r}"
                )

    def remove(self, instance_id: str, by: str = By.START) -> Endpoint:
        """Forget an instance. Requests in flight on it go on; their reservations stay valid."""
        endpoint = self.get(instance_id)
        del self._endpoints[instance_id]
        self._untried[endpoint.instance.role].discard(endpoint)
        endpoint.draining = True
        endpoint.holder.close()
        self._changed(by)
        return endpoint

    def drain(self, instance_id: str, by: str = By.START) -> Endpoint:
        """Send nothing new to an instance."""
        endpoint = self.get(instance_id)
        if not endpoint.draining:
            endpoint.draining = True
            endpoint.drain_told = endpoint.drained
            self._changed(by)
        return endpoint

    def undrain(self, instance_id: str, by: str = By.START) -> Endpoint:
        """Let an instance take requests again, as soon as its health allows."""
        endpoint = self.get(instance_id)
        if endpoint.draining:
            endpoint.draining = False
            self._changed(by)
        return endpoint

    def get(self, instance_id: str) -> Endpoint:
        """Return the endpoint with this id; raises :exc:`UnknownInstance`."""
        try:
            return self._endpoints[instance_id]
        except KeyError:
            raise UnknownInstance(instance_id) from None

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

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after each change in membership, address, health or draining.

        The end of a drain is told at the next probe.
        """
        self._listeners.append(listener)

    def watch(self, role: InstanceRole) -> set[Endpoint]:
        """Return a new set to which each endpoint of a role is added when its load changes.

        That is when a request is reserved or released there, when it is scraped, and when it says that it is
        full. The caller empties the set, and so need not look at all endpoints to see what has changed.
        """
        changed: set[Endpoint] = set()
        self._watchers[role].append(changed)
        return changed

    def resolved(self, endpoint: Endpoint, ip: str, now: float = 0.0) -> None:
        """Record the IP address behind an instance's DNS name, as it was found at a time."""
        endpoint.resolved_at = now
        address = join_address(ip, endpoint.instance.port)
        if endpoint.address != address:
            self._move(endpoint, address)
            self._changed(By.PROBE)

    def probed(self, endpoint: Endpoint, problem: str | None, now: float = 0.0) -> None:
        """Record a health probe: ``None`` is success, else the reason for people.

        The first probe decides alone; later ones need the policy's thresholds. A success also gives an
        ejected instance a trial, once its pause is over.
        """
        ok = problem is None
        if endpoint.drained and not endpoint.drain_told:
            endpoint.drain_told = True
            self._changed(By.REQUEST)
        if ok and endpoint.breaker.probed(now):
            self._changed(By.PROBE)
        if endpoint.breaker.state is BreakerState.CLOSED or not ok:
            endpoint.reason = problem or ""
        if endpoint.healthy is ok:
            endpoint.streak = 0
            return
        endpoint.streak += 1
        threshold = self.policy.healthy_threshold if ok else self.policy.unhealthy_threshold
        if endpoint.healthy is None or endpoint.streak >= threshold:
            endpoint.healthy = ok
            endpoint.streak = 0
            self._changed(By.PROBE)

    def scraped(
        self,
        endpoint: Endpoint,
        snapshot: MetricsSnapshot,
        in_flight_at_scrape: int,
        tokens_at_scrape: float = 0.0,
    ) -> None:
        """Record a scrape, and what of ours was there when it was asked for: requests and their tokens."""
        before, endpoint.metrics = endpoint.metrics, snapshot
        endpoint.scraped_at = snapshot.taken_at
        endpoint.changed()
        endpoint.in_flight_at_scrape = in_flight_at_scrape
        endpoint.tokens_at_scrape = tokens_at_scrape
        if snapshot.kv_capacity is not None:
            endpoint.kv_capacity = snapshot.kv_capacity
            blocks = int(snapshot.kv_capacity / self.block_tokens)
            endpoint.holder.resize(min(max(1, blocks), _MOST_BLOCKS))
        if endpoint.instance.role is InstanceRole.DECODE:
            self._learn_decode(endpoint, before, snapshot)
        if self.on_scraped is not None:
            self.on_scraped()

    def _move(self, endpoint: Endpoint, address: str) -> None:
        """Set an endpoint's address. Those at one address are one server, and have one breaker."""
        endpoint.address = address
        first = self.at(endpoint.instance.role, address)
        if first is not None:
            endpoint.breaker = first.breaker
        elif any(e.breaker is endpoint.breaker for e in self._endpoints.values() if e is not endpoint):
            endpoint.breaker = Breaker(self.policy.breaker)

    def forget_metrics(self, endpoint: Endpoint) -> None:
        """Record that an instance has not been scraped for too long: its load is not known any more."""
        endpoint.metrics = None
        endpoint.in_flight_at_scrape, endpoint.tokens_at_scrape = 0, 0.0
        endpoint.changed()

    def serves(self, endpoint: Endpoint, models: frozenset[str] | None) -> None:
        """Record which models an instance serves; ``None``: it has not said so for too long."""
        if endpoint.models != models:
            endpoint.models = models
            self.models_version += 1

    def _learn_decode(self, endpoint: Endpoint, before: MetricsSnapshot | None, now: MetricsSnapshot) -> None:
        self.load.learn_output(now.output_tokens, now.finished)
        if now.transfer is not None:
            self.load.learn_transfer(now.transfer)
        if before is None or now.step_time is None:
            return
        batch = (before.running + now.running) / 2
        kv_tokens = (before.kv_usage + now.kv_usage) / 2 * (endpoint.kv_capacity or 0.0)
        if batch > 0:
            endpoint.decode.learn(batch, kv_tokens, now.step_time, self.load.decode)
            self._learned(endpoint)

    def reserve(self, endpoint: Endpoint, request: RequestContext | None = None) -> Reservation:
        """Count a request on an endpoint from now on (``request.now``), with the work that it brings."""
        reservation = Reservation(endpoint, endpoint.generation)
        if request is not None:
            self._weigh(reservation, request)  # what fails, fails before anything is counted
        endpoint.changed()
        endpoint.in_flight += 1
        endpoint.tokens += reservation.tokens
        if endpoint.breaker.state is BreakerState.HALF_OPEN and not endpoint.on_trial:
            endpoint.trial = reservation
        if request is not None:
            if request.blocks:
                endpoint.holder.store(request.blocks)
            if endpoint.instance.role is InstanceRole.PREFILL:
                endpoint.prefill.enqueue(reservation, reservation.cost, request.now)
        return reservation

    def _weigh(self, reservation: Reservation, request: RequestContext) -> None:
        """Note the work that a request brings, and that what is cached of its prompt saves."""
        endpoint = reservation.endpoint
        reservation.at = request.now
        if request.blocks:
            size = max(_LEAST_BLOCK_TOKENS, request.block_tokens)
            self.block_tokens += _RECENT * (size - self.block_tokens)
        if endpoint.instance.role is InstanceRole.DECODE:
            reservation.tokens = request.prompt_tokens + request.output_tokens
            return
        load, blocks = endpoint.prefill, request.cached_blocks(endpoint.holder)
        reservation.cached = min(request.prompt_tokens, blocks * request.block_tokens)
        reservation.tokens = max(1.0, request.prompt_tokens - load.trust * reservation.cached)
        reservation.wait = load.remaining(request.now)
        reservation.cost = load.cost(reservation.tokens, request.prompt_tokens)

    def prefilled(
        self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None, now: float
    ) -> None:
        """End a claim on prefill with what the instance says it read, and learn from how long it took.

        ``cached_tokens`` is ``None`` if it does not say; then what was predicted is taken for true.
        """
        load = reservation.endpoint.prefill
        seconds = reservation.finish(now)
        if seconds is None:
            return
        cached = int(load.trust * reservation.cached) if cached_tokens is None else max(0, cached_tokens)
        if cached_tokens is not None:
            load.learn_cached(reservation.cached, cached)
        load.learn(max(1, prompt_tokens - cached), prompt_tokens, seconds, self.load.prefill)
        self._learned(reservation.endpoint)

    def _learned(self, endpoint: Endpoint) -> None:
        """Tell what the fleet has learned to those of a role of which nothing was measured yet."""
        role = endpoint.instance.role
        untried = self._untried[role]
        untried.discard(endpoint)
        for other in untried:
            if role is InstanceRole.DECODE:
                other.decode.adopt(self.load.decode)
            else:
                other.prefill.adopt(self.load.prefill)

    def succeeded(self, endpoint: Endpoint) -> None:
        """Record a request that an instance served."""
        endpoint.doubts.clear()
        endpoint.busy_answers = 0
        if endpoint.breaker.succeeded():
            self._changed(By.REQUEST)

    def failed(self, endpoint: Endpoint, reason: str, now: float) -> None:
        """Record a request that an instance failed; it may be ejected for that.

        No more than ``max_ejected_share`` of a role is out at once, so that a fault they share (a bad
        client, a broken model) does not end all service; an instance on trial goes out in any case.
        """
        if endpoint.breaker.failed():
            self._eject(endpoint, reason, now)

    def errored(self, endpoint: Endpoint, before: Sequence[Endpoint], reason: str, now: float) -> None:
        """Record a 500 for a request to which those ``before`` have answered 500 too.

        The first is a failure. With a second it may be the request's fault: then the failure is taken back,
        and what happened is doubtful for all.
        """
        if not before:
            self.failed(endpoint, reason, now)
            return
        if len(before) == 1:
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
            self._eject(endpoint, f"{reason}, where others of its role serve", now)

    def stands_out(self, endpoint: Endpoint) -> bool:
        """Whether an instance, and not the fleet, is the reason for what happens there.

        It is unhealthy or ejected, or has many doubtful ends where its peers have few.
        """
        return endpoint.state is InstanceState.UNHEALTHY or self._odd(endpoint)

    def _odd(self, endpoint: Endpoint) -> bool:
        peers = (e.doubts for e in self._routable[endpoint.instance.role] if e is not endpoint)
        return endpoint.doubts.odd_among(peers)

    def overloaded(self, endpoint: Endpoint, now: float, retry_after: float | None = None) -> None:
        """Record that an instance is full: neither its failure nor a success.

        It is left alone for as long as it asks (``retry_after``, seconds), else for ``BUSY_PAUSE_S``, twice
        as long each time until it serves a request again.
        """
        pause = BUSY_PAUSE_S * 2 ** min(endpoint.busy_answers, 5) if retry_after is None else retry_after
        pause = max(pause, BUSY_PAUSE_S)
        endpoint.busy_answers += 1
        endpoint.busy_until = now + min(pause, MAX_BUSY_PAUSE_S)
        self.busy_until = max(self.busy_until, endpoint.busy_until)
        endpoint.changed()

    def _eject(self, endpoint: Endpoint, reason: str, now: float) -> None:
        if endpoint.breaker.state is BreakerState.OPEN:
            return
        peers = self.endpoints(endpoint.instance.role)
        out = sum(e.breaker.state is not BreakerState.CLOSED for e in peers if e is not endpoint)
        if out + 1 <= self.policy.max_ejected_share * len(peers):
            endpoint.breaker.open(now)
            endpoint.reason = f"ejected: {reason}"
            self._changed(By.REQUEST)

    def at(self, role: InstanceRole, address: str) -> Endpoint | None:
        """Return the endpoint of a role at an ``ip:port``, if there is one: of several the first added."""
        return self._by_address[role].get(address)

    def started(self, endpoint: Endpoint, started_at: float | None) -> bool:
        """Record when an instance's process was started; return whether it is another one than before.

        A restarted instance has none of the requests, and none of the failures, of the one before.
        """
        before, endpoint.started_at = endpoint.started_at, started_at
        if before is None or started_at is None or before == started_at:
            return False
        endpoint.generation += 1
        endpoint.in_flight = endpoint.in_flight_at_scrape = 0
        endpoint.tokens = endpoint.tokens_at_scrape = 0.0
        endpoint.prefill.reset()
        endpoint.holder.clear()
        endpoint.breaker.restarted()
        endpoint.doubts = DoubtfulEnds()
        endpoint.busy_until, endpoint.busy_answers = 0.0, 0
        endpoint.models = None
        self._changed(By.PROBE)
        return True

    def _changed(self, by: str) -> None:
        self.changed_by = by
        for role in InstanceRole:
            endpoints = self.endpoints(role)
            if not any(e.routable for e in endpoints):
                for endpoint in endpoints:  # one that fails now and then is better than none
                    endpoint.breaker.readmit()
            self._routable[role] = tuple(e for e in endpoints if e.routable)
            self._ejected[role] = tuple(e for e in endpoints if e.ejected)
            self._by_address[role] = {e.address: e for e in reversed(endpoints) if e.address is not None}
        self.trials = any(e.breaker.state is not BreakerState.CLOSED for e in self._endpoints.values())
        for listener in self._listeners:
            listener()


def _place(instance: PDInstance) -> tuple[InstanceRole, str, int]:
    """Return what no two instances may share. A final dot makes no other name of it."""
    return instance.role, instance.host.removesuffix("."), instance.port
