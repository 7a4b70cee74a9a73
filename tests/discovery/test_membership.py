"""The registry follows the sources: who comes, drains, comes back and goes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.discovery.test_merge import HISTORY, instance
from vllm_pd_scheduler.discovery import ADMIN, Membership
from vllm_pd_scheduler.fleet.registry import DuplicateInstance, Registry, UnknownInstance
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance
from vllm_pd_scheduler.records.events import Events

FILE, OTHER = "file:a", "file:b"
X, Y = instance("x", "10.0.0.1"), instance("y", "10.0.0.2")


@pytest.fixture
def events() -> Events:
    return Events(lambda: 0.0)


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def fleet(registry: Registry, events: Events) -> Membership:
    return Membership(registry, events)


def states(registry: Registry) -> dict[str, bool]:
    """Whether each instance drains, by id."""
    return {endpoint.id: endpoint.draining for endpoint in registry}


def busy(registry: Registry, name: str) -> Reservation:
    return registry.work.reserve(registry.get(name))


def end(registry: Registry, reservation: Reservation) -> None:
    """End a request, and say that something has ended."""
    reservation.release()
    registry.tell_drained()


def test_an_instance_that_is_dropped_drains_and_is_removed_when_its_requests_have_ended(
    fleet: Membership, registry: Registry
) -> None:
    fleet.update(FILE, [X, Y])
    running = busy(registry, "x")
    fleet.update(FILE, [])
    assert states(registry) == {"x": True}, "y had nothing to do"
    assert fleet.leaves("x")
    end(registry, running)
    assert states(registry) == {}


def test_one_that_comes_back_while_it_drains_serves_again(fleet: Membership, registry: Registry) -> None:
    fleet.update(FILE, [X])
    running, endpoint = busy(registry, "x"), registry.get("x")
    for _ in range(3):
        fleet.update(FILE, [])
        assert registry.get("x").state is InstanceState.DRAINING
        fleet.update(OTHER, [X])
        assert states(registry) == {"x": False}
        fleet.update(OTHER, [])
        fleet.update(FILE, [X])
    assert registry.get("x") is endpoint
    end(registry, running)
    assert states(registry) == {"x": False}


def test_ranks_come_and_go_as_one(fleet: Membership, registry: Registry) -> None:
    ranked = replace(X, data_parallel_size=2)
    fleet.update(FILE, [ranked, Y])
    assert states(registry) == {"x:0": False, "x:1": False, "y": False}
    running = busy(registry, "x:1")
    fleet.update(FILE, [Y])
    assert states(registry) == {"x:0": True, "x:1": True, "y": False}
    assert (fleet.leaves("x"), fleet.sources("x")) == (True, ())
    end(registry, running)
    assert states(registry) == {"y": False}


def test_another_number_of_ranks(fleet: Membership, registry: Registry) -> None:
    """They are other endpoints then; what operators have drained stays so."""
    fleet.update(FILE, [X])
    fleet.drain("x")
    fleet.update(FILE, [replace(X, data_parallel_size=2)])
    assert states(registry) == {"x:0": True, "x:1": True}
    fleet.undrain("x:1")
    busy(registry, "x:0")
    fleet.update(FILE, [replace(X, data_parallel_size=3)])
    assert states(registry) == {"x:0": False, "x:1": False, "x:2": False}
    fleet.update(FILE, [X])
    assert states(registry) == {"x": False}
    assert (fleet.drained_and_away(), fleet.sources("x")) == ([], (FILE,))


@pytest.mark.parametrize("early", [True, False], ids=["before it is dropped", "while it leaves"])
def test_one_that_operators_have_drained_stays_so(fleet: Membership, registry: Registry, early: bool) -> None:
    fleet.update(FILE, [X])
    running = busy(registry, "x")
    steps: list[Callable[[], None]] = [lambda: fleet.drain("x"), lambda: fleet.update(FILE, [])]
    for step in steps if early else steps[::-1]:
        step()
    fleet.update(FILE, [X])
    assert states(registry) == {"x": True}
    end(registry, running)
    assert states(registry) == {"x": True}, "it is still named"
    fleet.update(FILE, [])
    fleet.update(FILE, [X])
    assert states(registry) == {"x": True}, "another endpoint, and the same drain"
    fleet.undrain("x")
    assert states(registry) == {"x": False}


def test_a_request_that_comes_to_one_that_is_drained_already_does_not_keep_it(
    fleet: Membership, registry: Registry
) -> None:
    """Envoy may retry there what it was told before the drain."""
    fleet.update(FILE, [X])
    fleet.drain("x")
    running = busy(registry, "x")
    fleet.update(FILE, [])
    assert states(registry) == {"x": True}
    end(registry, running)
    assert states(registry) == {}


def test_an_undrain_does_not_keep_what_no_source_names(fleet: Membership, registry: Registry) -> None:
    fleet.update(FILE, [X])
    busy(registry, "x")
    fleet.update(FILE, [])
    fleet.undrain("x")
    assert states(registry) == {"x": True}


def test_one_at_another_place_replaces_the_one_before_at_once(fleet: Membership, registry: Registry) -> None:
    fleet.update(FILE, [X])
    running, before = busy(registry, "x"), registry.get("x")
    moved = instance("x", "10.0.0.9")
    fleet.update(FILE, [moved])
    assert registry.get("x").instance == moved
    end(registry, running)
    assert before.in_flight == 0
    assert states(registry) == {"x": False}


def test_one_that_leaves_makes_room_for_another_one_with_its_id_or_place(
    fleet: Membership, registry: Registry
) -> None:
    for other in (instance("x", "10.0.0.9"), instance("z", "10.0.0.1")):
        fleet.update(FILE, [X])
        busy(registry, "x")
        fleet.update(FILE, [])
        assert fleet.leaves("x")
        fleet.update(OTHER, [other])
        assert [endpoint.instance for endpoint in registry] == [other]
        fleet.update(OTHER, [])


def test_another_key_is_no_other_endpoint(fleet: Membership, registry: Registry) -> None:
    fleet.update(FILE, [X])
    before, changes = registry.get("x"), []
    registry.changes.subscribe(lambda: changes.append(registry.changes.by))
    keyed = instance("x", "10.0.0.1", api_key="new", tls_name="x.example")
    fleet.update(FILE, [keyed], "discovery file:a")
    assert registry.get("x") is before
    assert before.instance == keyed
    assert changes == ["discovery file:a"]


def test_many_changes_are_told_once(fleet: Membership, registry: Registry) -> None:
    told: list[int] = []
    registry.changes.subscribe(lambda: told.append(len(registry.endpoints())))
    fleet.update(FILE, [instance(f"i{n}", f"10.0.1.{n}") for n in range(100)])
    fleet.update(FILE, [instance(f"i{n}", f"10.0.1.{n}") for n in range(50, 150)])
    assert told[0] == 100
    assert told[-1] == 100
    assert len(told) <= 3
    fleet.update(FILE, [instance(f"i{n}", f"10.0.1.{n}") for n in range(50, 150)])
    assert len(told) <= 3, "nothing has changed"


class TestOperators:
    def test_what_they_remove_stays_away_as_long_as_it_is_named(
        self, fleet: Membership, registry: Registry
    ) -> None:
        fleet.update(FILE, [X, Y])
        fleet.update(OTHER, [instance("also-x", "10.0.0.1")])
        fleet.remove("x")
        fleet.update(FILE, [X, Y])
        fleet.update(OTHER, [instance("also-x", "10.0.0.1")])
        assert set(states(registry)) == {"y"}
        assert {each.instance_id for each in fleet.removed()} == {"x", "also-x"}
        fleet.update(FILE, [Y])
        fleet.update(OTHER, [])
        assert fleet.removed() == []
        fleet.update(FILE, [X, Y])
        assert set(states(registry)) == {"x", "y"}

    def test_what_they_add_again_is_there(self, fleet: Membership, registry: Registry) -> None:
        fleet.update(FILE, [X])
        fleet.remove("x")
        keyed = instance("x", "10.0.0.1", api_key="operator's")
        fleet.add(keyed)
        assert registry.get("x").instance == keyed
        assert fleet.sources("x") == (ADMIN, FILE)
        fleet.update(FILE, [])
        assert fleet.sources("x") == (ADMIN,)
        fleet.remove("x")
        assert states(registry) == {}

    def test_what_is_taken_is_refused(self, fleet: Membership, registry: Registry) -> None:
        fleet.update(FILE, [X])
        for clash in (X, instance("x", "10.0.0.3"), instance("z"), instance("z", role=InstanceRole.PREFILL)):
            with pytest.raises(DuplicateInstance):
                fleet.add(clash)
        assert [endpoint.instance for endpoint in registry] == [X]
        fleet.update(FILE, [])
        fleet.add(X)

    def test_one_that_leaves_can_be_added(self, fleet: Membership, registry: Registry) -> None:
        fleet.update(FILE, [X])
        busy(registry, "x")
        fleet.update(FILE, [])
        fleet.add(X)
        assert states(registry) == {"x": False}

    def test_unknown_ids(self, fleet: Membership) -> None:
        for call in (fleet.remove, fleet.drain, fleet.undrain):
            with pytest.raises(UnknownInstance):
                call("nobody")


class TestWhatIsTold:
    def test_a_clash_is_said_once(self, fleet: Membership, events: Events) -> None:
        fleet.update(FILE, [X])
        for _ in range(3):
            fleet.update(OTHER, [instance("x", "10.0.0.3")], "discovery file:b")
        (event,) = events.after(0)
        assert (event.kind, event.by) == ("discovery", "discovery file:b")
        assert "is left out" in event.text
        assert len(fleet.refused) == 1

    def test_a_source_that_is_lost_is_said_once_and_its_age_grows(
        self, fleet: Membership, events: Events, registry: Registry
    ) -> None:
        fleet.update(FILE, [X])
        fleet.heard(FILE, 100.0)
        for _ in range(3):
            fleet.lost(FILE, "fleet.json: cannot be read")
        assert fleet.ages(160.0) == {FILE: 60.0}
        assert set(states(registry)) == {"x"}
        fleet.heard(FILE, 170.0)
        assert fleet.ages(171.0) == {FILE: 1.0}
        assert [event.text for event in events.after(0)] == [
            "fleet.json: cannot be read; the instances that were known stay",
            "file:a: all is well again",
        ]

    def test_a_source_that_is_no_more(self, fleet: Membership, registry: Registry) -> None:
        fleet.update(FILE, [X])
        fleet.update(OTHER, [X, Y])
        fleet.heard(OTHER, 1.0)
        fleet.forget(OTHER)
        assert set(states(registry)) == {"x"}
        assert fleet.ages(2.0) == {}


@given(HISTORY, st.data())
def test_what_is_named_is_there_and_what_runs_is_not_lost(
    history: list[tuple[str, list[PDInstance]]], data: st.DataObject
) -> None:
    registry = Registry()
    fleet = Membership(registry, Events(lambda: 0.0))
    told: dict[str, list[PDInstance]] = {}
    running: list[Reservation] = []
    for source, instances in history:
        told[source] = instances
        fleet.update(source, instances)
        here = list(registry)
        if here and data.draw(st.booleans()):
            running.append(registry.work.reserve(data.draw(st.sampled_from(here))))
        serving = {endpoint.instance.place for endpoint in here if not endpoint.draining}
        named = {each.place for found in told.values() for each in found}
        assert serving <= named
        assert len(named - serving) == len(fleet.refused)
        for endpoint in here:
            assert endpoint.draining is fleet.leaves(endpoint.id)
            assert endpoint.draining is (not fleet.sources(endpoint.id))
    for reservation in running:
        end(registry, reservation)
        assert reservation.endpoint.in_flight >= 0
    for endpoint in registry:
        registry.probed(endpoint, None)
    assert not any(endpoint.draining for endpoint in registry)
