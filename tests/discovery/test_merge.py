"""What several sources name becomes one set: invariants for any sources, and the cases by name."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.discovery.merge import Member, merge
from vllm_pd_scheduler.models import InstanceRole, PDInstance

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
SOURCES = ("admin", "config", "file:a", "file:b")

INSTANCES = st.builds(
    PDInstance,
    instance_id=st.sampled_from(["a", "b", "c", "d"]),
    role=st.sampled_from([P, D]),
    host=st.sampled_from(["10.0.0.1", "10.0.0.2", "[::1]", "name.example", "name.example."]),
    port=st.sampled_from([1, 2]),
    api_key=st.sampled_from([None, "key"]),
)
TOLD = st.fixed_dictionaries({source: st.lists(INSTANCES, max_size=4) for source in SOURCES})
HISTORY = st.lists(st.tuples(st.sampled_from(SOURCES), st.lists(INSTANCES, max_size=4)), max_size=8)


def instance(name: str, host: str = "10.0.0.1", role: InstanceRole = D, **more: str) -> PDInstance:
    return PDInstance(name, role, host, 8000, **more)


def after(history: list[tuple[str, list[PDInstance]]]) -> tuple[dict[str, list[PDInstance]], list[Member]]:
    """What is told at the end, and the set that has come of it, update by update."""
    told: dict[str, list[PDInstance]] = {source: [] for source in SOURCES}
    members: list[Member] = []
    for source, instances in history:
        told[source] = instances
        members = list(merge(told, members).members.values())
    return told, members


@given(HISTORY)
def test_nothing_that_a_source_names_is_lost_without_a_reason(
    history: list[tuple[str, list[PDInstance]]],
) -> None:
    told, standing = after(history)
    merged = merge(told, standing)
    there = {member.instance.place for member in merged.members.values()}
    named = {each.place for instances in told.values() for each in instances}
    assert there <= named
    assert len(named - there) == len(merged.refused)


@given(HISTORY)
def test_ids_and_places_are_unique(history: list[tuple[str, list[PDInstance]]]) -> None:
    told, standing = after(history)
    members = merge(told, standing).members
    assert all(key == member.instance.instance_id for key, member in members.items())
    assert len({member.instance.place for member in members.values()}) == len(members)
    for member in members.values():
        for source in SOURCES:
            names = member.instance.place in (each.place for each in told[source])
            assert names is (source in member.sources)


@given(HISTORY, TOLD)
def test_who_is_there_and_still_named_stays(
    history: list[tuple[str, list[PDInstance]]], told: dict[str, list[PDInstance]]
) -> None:
    _, standing = after(history)
    merged = merge(told, standing).members
    for member in standing:
        place, key = member.instance.place, member.instance.instance_id
        gives = [i.instance_id for i in told[member.named_by] if i.place == place]
        if any(place == each.place for found in told.values() for each in found) and (
            not gives or key in gives
        ):
            own = merged.get(key)
            clash = any(
                other.sources != member.sources and other.instance.place[1:] == place[1:]
                for other in merged.values()
            )
            assert clash or (own is not None and own.instance.place == place)


@given(TOLD)
def test_the_same_sets_again_change_nothing(told: dict[str, list[PDInstance]]) -> None:
    first = merge(told)
    assert merge(told, first.members.values()) == first


@given(st.permutations([("admin", 0), ("config", 1), ("file:a", 2), ("file:b", 3)]), st.data())
def test_in_which_order_sources_tell_does_not_matter(
    order: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Where they agree on ids: of a clash the first one keeps its place."""
    fleet = [instance(f"i{number}", f"10.0.0.{number}") for number in range(1, 9)]
    chosen = [data.draw(st.lists(st.sampled_from(fleet), unique=True)) for _ in SOURCES]
    told, members = after([(source, chosen[index]) for source, index in order])
    found = {member.instance.instance_id: (member.instance, member.sources) for member in members}
    once = merge(told).members
    assert found == {key: (member.instance, member.sources) for key, member in once.items()}


def test_one_place_is_one_endpoint_until_the_last_source_drops_it() -> None:
    one, other = instance("one", "10.0.0.1"), instance("other", "10.0.0.1.".rstrip("."))
    told = {"config": [one], "file:a": [other]}
    first = merge(told)
    assert {key: member.sources for key, member in first.members.items()} == {"one": ("config", "file:a")}
    second = merge({"config": [], "file:a": [other]}, first.members.values())
    assert {key: member.sources for key, member in second.members.items()} == {"one": ("file:a",)}
    assert merge({"config": [], "file:a": []}, second.members.values()).members == {}


def test_the_source_that_gave_an_id_can_give_another_one() -> None:
    first = merge({"file:a": [instance("old")]})
    assert list(merge({"file:a": [instance("new")]}, first.members.values()).members) == ["new"]


def test_ids_that_are_swapped() -> None:
    first = merge({"file:a": [instance("x", "10.0.0.1"), instance("y", "10.0.0.2")]})
    told = {"file:a": [instance("y", "10.0.0.1"), instance("x", "10.0.0.2")]}
    found = merge(told, first.members.values())
    assert {key: member.instance.host for key, member in found.members.items()} == {
        "y": "10.0.0.1",
        "x": "10.0.0.2",
    }
    assert not found.refused


def test_the_first_source_says_how_an_instance_is_spoken_with() -> None:
    told = {"config": [instance("x", api_key="config's")], "file:a": [instance("x", api_key="file's")]}
    assert merge(told).members["x"].instance.api_key == "config's"


def test_clashes_are_refused_with_the_reason_and_the_rest_goes_on() -> None:
    for told, reason in (
        (
            {"config": [instance("x")], "file:a": [instance("x", "10.0.0.2"), instance("y", "10.0.0.3")]},
            "file:a: the decode instance 'x' at 10.0.0.2:8000 is left out: "
            "config has this id for the decode instance at 10.0.0.1:8000",
        ),
        (
            {"config": [instance("x")], "file:a": [instance("z", role=P), instance("y", "10.0.0.3")]},
            "file:a: the prefill instance 'z' at 10.0.0.1:8000 is left out: "
            "config has the decode instance 'x' there",
        ),
    ):
        found = merge(told)
        assert found.refused == (reason,)
        assert set(found.members) == {"x", "y"}


def test_who_was_there_first_keeps_its_id_in_any_order() -> None:
    for order in permutations(["admin", "config", "file:a"]):
        history = [(name, [instance("x", f"10.0.0.{n}")]) for n, name in enumerate(order, 1)]
        _, members = after(history)
        assert [member.instance.host for member in members] == ["10.0.0.1"]
