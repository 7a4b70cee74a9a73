"""The one mutable state: which instances there are, how they are, and what is in flight on them.

Synchronous, does no I/O, and takes every time it needs as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .breaker import Breaker, BreakerPolicy, BreakerState
from .models import InstanceRole, InstanceState, MetricsSnapshot, PDInstance, is_ip, join_address


class UnknownInstance(KeyError):
    """No instance has this id."""

    def __str__(self) -> str:
        return f"no instance has the id {self.args[0]!r}"


class DuplicateInstance(ValueError):
    """An id, or an address within a role, is taken already."""


@dataclass(slots=True, eq=False)
class Endpoint:
    """An instance and all that is known of it. Only the registry changes it; strategies read it."""

    instance: PDInstance
    address: str | None = None
    """``ip:port``, the name by which Envoy knows the host; ``None`` until a DNS name was resolved."""
    metrics: MetricsSnapshot | None = None
    in_flight: int = 0
    """Requests that we sent there and that have not ended."""
    draining: bool = False
    healthy: bool | None = None
    """``None`` before the first probe."""
    reason: str = "not probed yet"
    """Why it is not healthy, for people."""
    in_flight_at_scrape: int = 0
    streak: int = 0
    """Successive probes that contradict ``healthy``."""
    breaker: Breaker = field(default_factory=lambda: Breaker(BreakerPolicy()))
    started_at: float | None = None
    """Start time of its process as it tells it, Unix seconds: another one means that it was restarted."""
    generation: int = 0
    """How often it was seen to restart. Reservations of an earlier generation count no more."""
    pending_handoffs: int = 0
    """Hand-offs that a P holds for requests whose answer has not ended."""

    @property
    def id(self) -> str:
        """The instance's id."""
        return self.instance.instance_id

    @property
    def state(self) -> InstanceState:
        """Draining wins over health, since it is what the operator asked for."""
        if self.draining:
            return InstanceState.DRAINING
        if self.healthy is None:
            return InstanceState.STARTING
        if self.healthy and self.breaker.state is not BreakerState.OPEN:
            return InstanceState.HEALTHY
        return InstanceState.UNHEALTHY

    @property
    def routable(self) -> bool:
        """Whether a new request may go there."""
        return self.state is InstanceState.HEALTHY and self.address is not None

    @property
    def drained(self) -> bool:
        """Whether it is draining and nothing that we sent, or that waits to be fetched, is left on it."""
        return self.draining and not self.in_flight and not self.pending_handoffs

    @property
    def on_trial(self) -> bool:
        """Whether it was ejected and its one trial request runs: nothing else goes there meanwhile."""
        return self.breaker.state is BreakerState.HALF_OPEN and self.in_flight > 0

    @property
    def waiting(self) -> float:
        """Requests queued there: the last scrape's, plus what we have sent since and it cannot know of.

        The second part is what keeps a burst between two scrapes from herding to one instance.
        """
        scraped = self.metrics.waiting if self.metrics else 0.0
        return max(0.0, scraped + self.in_flight - self.in_flight_at_scrape)

    @property
    def requests(self) -> float:
        """Requests running or queued there: ours exactly, and others' (another scheduler's) as last seen."""
        if self.metrics is None:
            return float(self.in_flight)
        others = self.metrics.running + self.metrics.waiting - self.in_flight_at_scrape
        return self.in_flight + max(0.0, others)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use at the last scrape, 0 to 1."""
        return self.metrics.kv_usage if self.metrics else 0.0

    @property
    def latency(self) -> float | None:
        """See :attr:`MetricsSnapshot.latency`."""
        return self.metrics.latency if self.metrics else None


@dataclass(slots=True, eq=False)
class Reservation:
    """One request's claim on an endpoint, counted from the moment of the pick until ``release``."""

    endpoint: Endpoint
    generation: int
    active: bool = True

    def release(self) -> None:
        """End the claim. Doing it twice is the same as once; after a restart of the instance, nothing."""
        if self.active:
            self.active = False
            if self.generation == self.endpoint.generation:
                self.endpoint.in_flight -= 1


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
    _endpoints: dict[str, Endpoint] = field(default_factory=dict)
    _listeners: list[Callable[[], None]] = field(default_factory=list)
    _routable: dict[InstanceRole, tuple[Endpoint, ...]] = field(
        default_factory=lambda: dict.fromkeys(InstanceRole, ())
    )

    def add(self, instance: PDInstance) -> Endpoint:
        """Register an instance; it takes requests once a probe found it healthy.

        Raises :exc:`DuplicateInstance` if the id, or the address within the role, is taken.
        """
        if instance.instance_id in self._endpoints:
            raise DuplicateInstance(f"the id {instance.instance_id!r} is taken")
        for other in self._endpoints.values():
            if (other.instance.role, other.instance.host, other.instance.port) == (
                instance.role,
                instance.host,
                instance.port,
            ):
                raise DuplicateInstance(
                    f"{join_address(instance.host, instance.port)} is already the {instance.role} "
                    f"instance {other.id!r}"
                )
        endpoint = Endpoint(instance, breaker=Breaker(self.policy.breaker))
        if is_ip(instance.host):
            endpoint.address = join_address(instance.host, instance.port)
        self._endpoints[instance.instance_id] = endpoint
        self._changed()
        return endpoint

    def remove(self, instance_id: str) -> Endpoint:
        """Forget an instance. Requests in flight on it go on; their reservations stay valid."""
        endpoint = self.get(instance_id)
        del self._endpoints[instance_id]
        endpoint.draining = True
        self._changed()
        return endpoint

    def drain(self, instance_id: str) -> Endpoint:
        """Send nothing new to an instance."""
        endpoint = self.get(instance_id)
        if not endpoint.draining:
            endpoint.draining = True
            self._changed()
        return endpoint

    def undrain(self, instance_id: str) -> Endpoint:
        """Let an instance take requests again, as soon as its health allows."""
        endpoint = self.get(instance_id)
        if endpoint.draining:
            endpoint.draining = False
            self._changed()
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

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after each change in membership, address, health or draining."""
        self._listeners.append(listener)

    def resolved(self, endpoint: Endpoint, ip: str) -> None:
        """Record the IP address behind an instance's DNS name."""
        address = join_address(ip, endpoint.instance.port)
        if endpoint.address != address:
            endpoint.address = address
            self._changed()

    def probed(self, endpoint: Endpoint, problem: str | None, now: float = 0.0) -> None:
        """Record a health probe: ``None`` is success, else the reason for people.

        The first probe decides alone; later ones need the policy's thresholds. A success also gives an
        ejected instance a trial, once its pause is over.
        """
        ok = problem is None
        if ok and endpoint.breaker.probed(now):
            self._changed()
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
            self._changed()

    def scraped(self, endpoint: Endpoint, snapshot: MetricsSnapshot, in_flight_at_scrape: int) -> None:
        """Record a scrape, and how many of our requests were there when it was asked for."""
        endpoint.metrics = snapshot
        endpoint.in_flight_at_scrape = in_flight_at_scrape

    def reserve(self, endpoint: Endpoint) -> Reservation:
        """Count a request on an endpoint from now on."""
        endpoint.in_flight += 1
        return Reservation(endpoint, endpoint.generation)

    def succeeded(self, endpoint: Endpoint) -> None:
        """Record a request that an instance served."""
        if endpoint.breaker.succeeded():
            self._changed()

    def failed(self, endpoint: Endpoint, reason: str, now: float) -> None:
        """Record a request that an instance failed; it may be ejected for that.

        No more than ``max_ejected_share`` of a role is out at once, so that a fault they share (a bad
        client, a broken model) does not end all service; an instance on trial goes out in any case.
        """
        if not endpoint.breaker.failed():
            return
        peers = self.endpoints(endpoint.instance.role)
        out = sum(e.breaker.state is not BreakerState.CLOSED for e in peers if e is not endpoint)
        if out + 1 <= self.policy.max_ejected_share * len(peers):
            endpoint.breaker.open(now)
            endpoint.reason = f"ejected: {reason}"
            self._changed()

    def at(self, role: InstanceRole, address: str) -> Endpoint | None:
        """Return the endpoint of a role at an ``ip:port``, if there is one."""
        return next((e for e in self.endpoints(role) if e.address == address), None)

    def started(self, endpoint: Endpoint, started_at: float | None) -> bool:
        """Record when an instance's process was started; return whether it is another one than before.

        A restarted instance has none of the requests, and none of the failures, of the one before.
        """
        before, endpoint.started_at = endpoint.started_at, started_at
        if before is None or started_at is None or before == started_at:
            return False
        endpoint.generation += 1
        endpoint.in_flight = endpoint.in_flight_at_scrape = 0
        endpoint.breaker.restarted()
        self._changed()
        return True

    def _changed(self) -> None:
        for role in InstanceRole:
            endpoints = self.endpoints(role)
            if not any(e.routable for e in endpoints):
                for endpoint in endpoints:  # one that fails now and then is better than none
                    endpoint.breaker.readmit()
            self._routable[role] = tuple(e for e in endpoints if e.routable)
        for listener in self._listeners:
            listener()
