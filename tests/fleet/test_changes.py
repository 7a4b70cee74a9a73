"""A change that says whom it is about has the same told, and the same found, as a look at the whole fleet."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_pd_scheduler.fleet.breaker import BreakerPolicy
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import HealthPolicy, Registry
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.health import StateLog
from vllm_pd_scheduler.models import By, InstanceRole, PDInstance
from vllm_pd_scheduler.records.events import Events
from vllm_pd_scheduler.telemetry import Telemetry

NAMES = ("p0", "p1", "d0", "d1", "d2", "d3")
D = InstanceRole.DECODE
ONCE = HealthPolicy(breaker=BreakerPolicy(failures=1), max_ejected_share=1.0)


def whole_fleet(registry: Registry) -> Registry:
    """A registry of which each change may be of anybody."""
    note = registry.changes.note
    registry.changes.note = lambda by=None, of=None: note(by)  # type: ignore[method-assign]
    return registry


class Fleet:
    """A registry, and what is told of it."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.leaving: set[str] = set()
        self.removed: list[Endpoint] = []
        self.held: list[Reservation] = []
        self.telemetry = Telemetry()
        self.events = Events(lambda: 0.0)
        registry.changes.subscribe(self._let_go)
        StateLog(registry, self.telemetry, self.events)

    def _let_go(self) -> None:
        """Remove what is drained and leaves: a change that a change makes, as membership does."""
        for name in sorted(self.leaving):
            if self.registry.drained(name):
                self.leaving.discard(name)
                self.removed.append(self.registry.remove(name, self.registry.changes.by))

    def add(self, name: str, host: str, size: int) -> None:
        """Add an instance, unless one of its name or place is there."""
        role = InstanceRole.PREFILL if name.startswith("p") else D
        instance = PDInstance(name, role, host, 80, data_parallel_size=size)
        places = {(ranks[0].instance.role, ranks[0].instance.host) for ranks in self.registry.instances()}
        if self.registry.find(name) is None and (role, host) not in places:
            self.registry.add(instance, By.ADMIN)

    def remove(self, name: str) -> None:
        """Remove an instance."""
        if self.registry.find(name) is not None:
            self.leaving.discard(name)
            self.removed.append(self.registry.remove(name, By.ADMIN))

    def leave(self, name: str) -> None:
        """Have an instance drain and go."""
        if self.registry.find(name) is not None:
            self.leaving.add(name)
            self.registry.drain(name, By.DISCOVERY)

    def at(self, name: str, rank: int, call: Callable[[Registry, Endpoint], object]) -> None:
        """Do something with an instance, if it is there, or with the one that was removed last."""
        first = self.registry.find(name)
        if first is not None:
            ranks = self.registry.ranks_of(first)
            call(self.registry, ranks[rank % len(ranks)])
        elif self.removed:
            call(self.registry, self.removed[-1])

    def release(self, number: int) -> None:
        """End a request."""
        if self.held:
            self.held.pop(number % len(self.held)).release()

    def shown(self) -> list[object]:
        """All that can be seen of it."""
        registry = self.registry
        told = [(each.by, each.subject, each.text, each.level) for each in self.events.after(0)]
        counts = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for metric in self.telemetry.prometheus.collect()
            for sample in metric.samples
            if "state_changes" in sample.name and not sample.name.endswith("_created")
        }
        lines: list[object] = [told, counts, registry.trials, [each.id for each in registry]]
        for role in InstanceRole:
            lines.append([each.id for each in (*registry.routable(role), *registry.ejected(role))])
            lines.append([(each.id, state) for each, state in registry.out_of_service(role)])
            found = (registry.at(role, f"10.0.0.{n}:80") for n in range(3))
            lines.append([each.id if each else None for each in found])
        return lines


name = st.sampled_from(NAMES)
rank = st.integers(0, 1)
times = st.sampled_from((0.0, 1.0, 2.0, 100.0))
CALLS: tuple[Callable[[Registry, Endpoint], object], ...] = (
    lambda registry, one: registry.ends.failed(one, "reset", 0.0),
    lambda registry, one: registry.ends.doubtful(one, "slow", 0.0),
    lambda registry, one: registry.ends.succeeded(one),
    lambda registry, one: registry.ends.errored(one, [one], "500", 0.0),
    lambda registry, one: registry.elsewhere.readmit(one, 100.0),
    lambda registry, one: registry.speaks(one, "nixl", False),
    lambda registry, one: registry.undrain(one.id) if one in registry else None,
    lambda registry, one: registry.drain(one.id, By.ADMIN) if one in registry else None,
    lambda registry, one: registry.changes.note(),
    lambda registry, one: registry.tell_drained(),
)


class Histories(RuleBasedStateMachine):
    """Two fleets with the same history: one looks at what has changed, the other at everything."""

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("vllm_pd_scheduler").setLevel(logging.CRITICAL)
        self.fleets = (Fleet(Registry(ONCE)), Fleet(whole_fleet(Registry(ONCE))))
        self.both: list[AbstractContextManager[None]] = []

    def teardown(self) -> None:
        """Have the log as before."""
        self._end()
        logging.getLogger("vllm_pd_scheduler").setLevel(logging.NOTSET)

    def _end(self) -> None:
        for each in self.both:
            each.__exit__(None, None, None)
        self.both = []

    @rule(
        name=name, host=st.sampled_from(("10.0.0.0", "10.0.0.1", "vllm-0", "vllm-1")), size=st.integers(1, 2)
    )
    def add(self, name: str, host: str, size: int) -> None:
        """An instance comes."""
        for fleet in self.fleets:
            fleet.add(name, host, size)

    @rule(name=name, slowly=st.booleans())
    def remove(self, name: str, slowly: bool) -> None:
        """An instance goes, at once or when it is drained."""
        for fleet in self.fleets:
            (fleet.leave if slowly else fleet.remove)(name)

    @rule(name=name, rank=rank, problem=st.sampled_from((None, None, "gone")), now=times)
    def probed(self, name: str, rank: int, problem: str | None, now: float) -> None:
        """An instance is probed."""
        for fleet in self.fleets:
            fleet.at(name, rank, lambda registry, one: registry.probed(one, problem, now))

    @rule(name=name, rank=rank, last=st.integers(0, 2))
    def resolved(self, name: str, rank: int, last: int) -> None:
        """A name leads somewhere."""
        for fleet in self.fleets:
            fleet.at(name, rank, lambda registry, one: registry.resolved(one, f"10.0.0.{last}"))

    @rule(name=name, rank=rank, at=times)
    def started(self, name: str, rank: int, at: float) -> None:
        """A process tells when it was started."""
        for fleet in self.fleets:
            fleet.at(name, rank, lambda registry, one: registry.started(one, at))

    @rule(name=name, rank=rank, call=st.sampled_from(CALLS))
    def call(self, name: str, rank: int, call: Callable[[Registry, Endpoint], object]) -> None:
        """Something else happens to an instance."""
        for fleet in self.fleets:
            fleet.at(name, rank, call)

    @rule(name=name, rank=rank)
    def request(self, name: str, rank: int) -> None:
        """A request is sent to an instance."""
        for fleet in self.fleets:
            held = fleet.held
            fleet.at(name, rank, lambda registry, one, held=held: held.append(registry.work.reserve(one)))

    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        """A request ends."""
        for fleet in self.fleets:
            fleet.release(number)

    @rule()
    def as_one(self) -> None:
        """Several changes are told as one, from now on or until now."""
        if self.both:
            self._end()
            return
        self.both = [fleet.registry.changes.as_one(By.PROBE) for fleet in self.fleets]
        for each in self.both:
            each.__enter__()

    @invariant()
    def the_same_is_told(self) -> None:
        """No look at one instance misses what a look at all finds."""
        one, other = (fleet.shown() for fleet in self.fleets)
        assert one == other


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def one_server_of_two_names(fleet: Fleet) -> None:
    """What becomes of the one is so for the other too, also of one that is removed."""
    for number in (0, 1, 2):
        fleet.add(f"d{number}", f"vllm-{number}", 1)
        fleet.at(f"d{number}", 0, lambda registry, one: registry.resolved(one, "10.0.0.1"))
        fleet.at(f"d{number}", 0, lambda registry, one: registry.probed(one, None, 0.0))
    fleet.add("d3", "10.0.0.2", 1)
    fleet.at("d3", 0, lambda registry, one: registry.probed(one, None, 0.0))
    fleet.at("d0", 0, lambda registry, one: registry.ends.failed(one, "reset", 0.0))
    fleet.remove("d0")
    fleet.at("d0", 0, lambda registry, one: registry.started(one, 1.0))
    fleet.at("d0", 0, lambda registry, one: registry.started(one, 2.0))


def drains_that_end(fleet: Fleet) -> None:
    """They are told when somebody else changes, or together."""
    for number in (0, 1, 2):
        fleet.add(f"d{number}", f"10.0.0.{number}", 1)
        fleet.at(f"d{number}", 0, lambda registry, one: fleet.held.append(registry.work.reserve(one)))
    for number in (0, 1):
        fleet.at(f"d{number}", 0, lambda registry, one: registry.drain(one.id))
    fleet.release(0)
    fleet.at("d2", 0, lambda registry, one: registry.probed(one, None, 0.0))
    fleet.at("d0", 0, lambda registry, one: fleet.held.append(registry.work.reserve(one)))
    fleet.at("d2", 0, lambda registry, one: registry.speaks(one, "nixl", False))
    for _ in range(3):
        fleet.release(0)
    fleet.registry.tell_drained()


def ranks_that_go(fleet: Fleet) -> None:
    """All of them go."""
    fleet.add("d0", "10.0.0.0", 2)
    fleet.at("d0", 1, lambda registry, one: registry.probed(one, None, 0.0))
    fleet.remove("d0")


@pytest.mark.parametrize("history", [one_server_of_two_names, drains_that_end, ranks_that_go])
def test_the_same_is_told(history: Callable[[Fleet], None]) -> None:
    one, other = Fleet(Registry(ONCE)), Fleet(whole_fleet(Registry(ONCE)))
    history(one)
    history(other)
    assert one.shown() == other.shown()


def test_who_has_changed() -> None:
    registry = Registry(ONCE)
    seen: list[Endpoint | None] = []
    registry.changes.subscribe(lambda: seen.append(registry.changes.of))
    d0, d1 = (registry.add(PDInstance(f"d{n}", D, f"10.0.0.{n}", 80)) for n in range(2))
    for each in (d0, d1):
        registry.probed(each, None)
    registry.ends.failed(d0, "reset", 0.0)
    assert seen == [d0, d1, d0, d1, d0]
    registry.ends.failed(d1, "reset", 0.0)
    assert seen.pop() is None, "the other one may be tried again too"
    for change in (partial(registry.drain, "d0"), nullcontext):
        with registry.changes.as_one(By.ADMIN):
            registry.drain("d1")
            change()
            registry.undrain("d1")
    assert seen[5:] == [None, d1]


def test_a_change_that_a_listener_makes_is_told_with_the_one_before() -> None:
    registry = Registry(ONCE)
    d0, d1 = (registry.add(PDInstance(f"d{n}", D, f"10.0.0.{n}", 80)) for n in range(2))
    seen: list[Endpoint | None] = []
    registry.changes.subscribe(lambda: registry.remove("d1") if d1 in registry else None)
    registry.changes.subscribe(lambda: seen.append(registry.changes.of))
    registry.drain("d0")
    assert seen == [None, None]
    registry.undrain("d0")
    assert seen[2:] == [d0]


def test_names_that_are_found_to_lead_to_one_server_at_once_have_one_breaker() -> None:
    registry = Registry(ONCE)
    d0, d1 = (registry.add(PDInstance(f"d{n}", D, f"vllm-{n}", 80)) for n in range(2))
    with registry.changes.as_one(By.PROBE):
        for each in (d0, d1):
            registry.resolved(each, "10.0.0.9")
    assert d0.breaker is d1.breaker
