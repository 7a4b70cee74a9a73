"""Tenants take turns over all replicas: what one is served there counts for its turn here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest

from vllm_pd_scheduler.admission.dispatcher import Dispatcher
from vllm_pd_scheduler.admission.queue import RequestQueue, Ticket, tenant_key
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.replicas import Disbelieved, FleetKey, Replica
from vllm_pd_scheduler.replicas.message import Drawn, Message
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler

KEY = FleetKey("fleet")
P, D = InstanceRole.PREFILL, InstanceRole.DECODE
DELAY_S = 0.02


def _ticket(tenant: str, cost: float, priority: int = 0) -> Ticket:
    return Ticket(RequestContext("/", tenant=tenant, priority=priority), P, 10, cost)


@dataclass(eq=False)
class One:
    """A replica with a queue, of which it serves one request at a time."""

    name: str
    registry: Registry = field(default_factory=Registry)
    queue: RequestQueue = field(default_factory=lambda: RequestQueue(1000, 10**9))
    free_at: float = 0.0

    def __post_init__(self) -> None:
        for number in range(3):
            instance = PDInstance(f"prefill-{number}", P, f"10.0.0.{number + 1}", 8000)
            self.registry.probed(self.registry.add(instance), None)
        self.registry.elsewhere.on_drawn = self.queue.drawn_elsewhere
        self.replica = Replica(self.registry, self.name, KEY)

    def serve(self, now: float, work: Counter[str]) -> str:
        """Serve the next, if the one before is done; return whose it is."""
        tenant = "light"
        if now >= self.free_at and (ticket := next(iter(self.queue), None)) is not None:
            self.queue.remove(ticket, served=True)
            tenant = ticket.request.tenant
            work[tenant] += ticket.cost  # type: ignore[assignment]
            self.free_at = now + ticket.cost
            assert self.registry.journal is not None
            self.registry.journal.drawn(ticket.request.priority, tenant_key(tenant), ticket.cost)
        return tenant


def _share_of_light(shared: bool) -> float:
    """Return the part of all work that a tenant of small demand gets, of which one replica has no request."""
    random, ones = Random(7), [One(name) for name in "abc"]
    work: Counter[str] = Counter()
    mail: list[tuple[float, One, bytes]] = []
    for one in ones:
        for _ in range(5):
            one.queue.push(_ticket("heavy", 1.0), 0.0)
    for step in range(30_000):
        now = step / 100
        if random.random() < 0.0195:  # 65 % of what all can serve
            ones[random.random() > 0.66].queue.push(_ticket("light", random.uniform(0.2, 1.8)), now)
        for one in ones:
            if one.serve(now, work) != "light":
                one.queue.push(_ticket("heavy", random.uniform(0.2, 1.8)), now)
            for data in one.replica.publish(now, (one.queue.waiting(P), 0)) if shared else ():
                mail += [(now + DELAY_S, other, data) for other in ones if other is not one]
        while mail and mail[0][0] <= now:
            _, other, data = mail.pop(0)
            other.replica.receive(data, now)
    return work["light"] / work.total()


def test_tenants_of_uneven_demand_get_equal_work_over_all_replicas() -> None:
    assert _share_of_light(shared=True) == pytest.approx(0.5, abs=0.02)
    assert _share_of_light(shared=False) < 0.36


def test_what_is_served_past_those_who_wait_elsewhere_counts() -> None:
    a = One("a")
    dispatcher = Dispatcher(Scheduler(SchedulerConfig(), a.registry))
    a.registry.probed(a.registry.add(PDInstance("decode-0", D, "10.0.1.1", 8000)), None)
    b = One("b")
    b.replica.receive(a.replica.snapshot(0.0), 0.0)
    b.queue.push(_ticket("x", 1.0), 0.0)
    b.queue.push(_ticket("y", 1.0), 0.0)

    def ask(now: float) -> None:
        dispatcher.submit(Ticket(RequestContext("/", tenant="x", prompt_tokens=1000.0, arrived=now), P), now)
        for each in a.replica.publish(now):
            b.replica.receive(each, now)

    ask(1.0)
    assert [each.request.tenant for each in b.queue] == ["x", "y"]
    a.replica.receive(b.replica.snapshot(1.1, (2, 0)), 1.1)
    ask(2.0)
    assert [each.request.tenant for each in b.queue] == ["y", "x"]


def test_priorities_are_apart_and_one_of_whom_nothing_waits_is_remembered() -> None:
    queue = RequestQueue(10, 1000)
    queue.push(_ticket("x", 1.0), 0.0)
    queue.drawn_elsewhere(1, tenant_key("x"), 5.0)
    queue.drawn_elsewhere(0, tenant_key("y"), 5.0)
    queue.push(_ticket("y", 1.0), 0.0)
    queue.push(_ticket("x", 1.0), 0.0)
    assert [each.request.tenant for each in queue] == ["x", "x", "y"]


def test_a_message_that_is_lost_is_made_good_by_the_next() -> None:
    a, b = One("a"), One("b")
    heard: list[float] = []
    b.registry.elsewhere.on_drawn = lambda priority, key, work: heard.append(work)
    b.replica.receive(a.replica.publish(0.0)[0], 0.0)
    assert a.registry.journal is not None
    for number in range(3):
        a.registry.journal.drawn(0, tenant_key("x"), 1.0)
        told = a.replica.publish(0.1 + number / 10)
        if number == 2:
            b.replica.receive(told[0], 0.4)
    assert heard == [3.0]
    a.registry.journal.drawn(0, tenant_key("x"), 1.0)
    a.replica.publish(0.5)  # lost, and nothing follows
    b.replica.receive(a.replica.publish(1.1)[0], 1.1)
    assert heard == [3.0, 1.0]


def test_no_more_is_believed_than_the_fleet_can_do() -> None:
    one = One("a")
    heard: list[float] = []
    one.registry.elsewhere.on_drawn = lambda priority, key, work: heard.append(work)
    for number in range(1, 100):
        drawn = [Drawn(0, bytes(8), 1e7 * number)]
        told = Message("x", number, number == 1, (0, 0), [], drawn=drawn)
        one.replica.receive(KEY.encode(told), number / 10)
    assert sum(heard) <= 3 * (30 + 2 * 9.9)
    assert one.replica.disbelieved[Disbelieved.DRAWS] == 98
