"""One scheduler of several, without I/O, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.replicas import FleetKey, Replica
from vllm_pd_scheduler.request.context import RequestContext

KEY = FleetKey("fleet")
P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def make_registry(each: int = 2) -> Registry:
    """Return a registry with so many healthy instances of each role."""
    registry = Registry()
    for number in range(each):
        for role in (P, D):
            host = f"10.0.{int(role is D)}.{number + 1}"
            registry.probed(registry.add(PDInstance(f"{role}-{number}", role, host, 8000)), None)
    return registry


def make_request(now: float, tokens: int = 1000, blocks: tuple[int, ...] = (1, 2)) -> RequestContext:
    """Return a request."""
    return RequestContext(
        "/v1/completions", prompt_tokens=tokens, output_tokens=10, blocks=blocks, arrived=now, now=now
    )


@dataclass(eq=False)
class One:
    """A scheduler, its clock ahead of the others' by ``skew``."""

    name: str
    skew: float = 0.0
    registry: Registry = field(default_factory=make_registry)
    claims: list[Reservation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.replica = Replica(self.registry, self.name, KEY)

    def send(
        self, endpoint: str, now: float, tokens: int = 1000, blocks: tuple[int, ...] = (1, 2)
    ) -> Reservation:
        """Reserve an endpoint for a request."""
        now += self.skew
        request = make_request(now, tokens, blocks)
        reservation = self.registry.work.reserve(self.registry.get(endpoint), request)
        self.claims.append(reservation)
        return reservation

    def end(self, index: int, now: float) -> None:
        """End a request: on P as prefilled, or given up."""
        if self.claims:
            claim = self.claims.pop(index % len(self.claims))
            if claim.endpoint.instance.role is P and index % 3:
                self.registry.work.prefilled(claim, 900, 100, now + self.skew)
            claim.release(now + self.skew)

    def publish(self, now: float) -> list[bytes]:
        """Return what it tells."""
        return self.replica.publish(now + self.skew, (1, 2))

    def hear(self, messages: list[bytes], now: float) -> None:
        """Take in what others tell."""
        for each in messages:
            self.replica.receive(each, now + self.skew)

    @property
    def endpoints(self) -> list[Endpoint]:
        """All endpoints."""
        return list(self.registry)

    def ours(self) -> list[tuple[int, int]]:
        """What it has itself on each endpoint."""
        return [(e.in_flight - e.elsewhere, round(e.tokens - e.tokens_elsewhere)) for e in self.endpoints]

    def loads(self) -> list[tuple[int, int, int]]:
        """All that it knows of each endpoint: requests, tokens, queued prefills."""
        return [(e.in_flight, round(e.tokens), len(list(e.prefill.pending))) for e in self.endpoints]


def sound(one: One) -> None:
    """See that all sums can be."""
    for endpoint in one.endpoints:
        assert 0 <= endpoint.elsewhere <= endpoint.in_flight
        assert endpoint.tokens >= 0
        assert endpoint.tokens_elsewhere >= 0
        assert endpoint.prefill.queued >= 0
