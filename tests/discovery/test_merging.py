"""The set that is kept is the one that merging all of it would give, after any history."""

from dataclasses import dataclass, field, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.discovery.merge import Member, Named, merge, named
from vllm_pd_scheduler.discovery.merging import Merging
from vllm_pd_scheduler.models import InstanceRole, PDInstance

SOURCES = ("admin", "config", "file:a", "file:b")
INSTANCES = st.builds(
    PDInstance,
    instance_id=st.sampled_from(["a", "b", "c", "d", "e"]),
    role=st.sampled_from(InstanceRole),
    host=st.sampled_from(["10.0.0.1", "10.0.0.2", "name.example", "name.example."]),
    port=st.sampled_from([1, 2]),
    api_key=st.sampled_from([None, "key"]),
)
TELLS = st.tuples(st.just("tell"), st.sampled_from(SOURCES), st.lists(INSTANCES, max_size=6))
MOVES = st.one_of(
    TELLS,
    TELLS,
    st.tuples(st.just("forget"), st.sampled_from(SOURCES)),
    st.tuples(st.just("hide"), INSTANCES),
    st.tuples(st.just("drop"), st.integers(0, 9)),
)

X, Z = (PDInstance(name, InstanceRole.DECODE, f"10.0.0.{name}", 1) for name in "xz")
Y = replace(X, instance_id="y")
GIVEN_BY_ANOTHER = (("config", []), ("file:a", [X, Z]), ("config", [X]), ("file:a", [Y, Z]))
"""The id of the first stays, but another source gives it now: so it is a new one, behind the other."""


@dataclass
class Whole:
    """What is told, and the set, all of it merged each time."""

    told: dict[str, list[PDInstance]] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def settle(self, hidden: set[Named]) -> None:
        told = {
            key: [each for each in found if named(each) not in hidden] for key, found in self.told.items()
        }
        merged = merge(told, self.members.values())
        self.members, self.refused = merged.members, merged.refused


@settings(max_examples=400, deadline=None)
@given(st.lists(MOVES, max_size=25))
@example([("tell", source, told) for source, told in GIVEN_BY_ANOTHER])
def test_it_is_what_merging_all_of_it_gives(moves: list[tuple[object, ...]]) -> None:
    hidden: set[Named] = set()
    merging, whole = Merging(lambda _, each: named(each) in hidden), Whole()
    for move in moves:
        match move:
            case ("tell", str(source), list(instances)):
                merging.tell(source, instances)
                whole.told[source] = instances
            case ("forget", str(source)):
                merging.forget(source)
                whole.told.pop(source, None)
            case ("hide", PDInstance() as instance):
                hidden ^= {named(instance)}
                merging.note(instance.place)
            case ("drop", int(number)):
                for key in list(whole.members)[number : number + 1]:
                    merging.drop(key)
                    del whole.members[key]
        before = dict(merging.members)
        whole.settle(hidden)
        settled = merging.settle()
        assert list(merging.members.items()) == list(whole.members.items())
        assert settled.after.refused == whole.refused
        told_of = {member.instance.instance_id for member in settled.before} | settled.after.members.keys()
        for key in (before.keys() | merging.members.keys()) - told_of:
            assert before.get(key) == merging.members.get(key), "the registry is to hear of it"
        for key, member in merging.members.items():
            assert merging.at(member.instance.place) == key


@given(st.lists(TELLS, max_size=8))
def test_a_look_changes_nothing(moves: list[tuple[str, str, list[PDInstance]]]) -> None:
    merging = Merging(lambda *_: False)
    for _, source, instances in moves:
        merging.tell(source, instances)
        before = dict(merging.members)
        seen = merging.look()
        assert merging.members == before
        assert merging.settle() == seen


def test_a_change_of_one_instance_merges_that_one() -> None:
    fleet = [PDInstance(f"i{n}", InstanceRole.DECODE, f"10.0.{n >> 8}.{n & 255}", 8000) for n in range(600)]
    merging = Merging(lambda *_: False)
    merging.tell("file:a", fleet[1:])
    merging.settle()
    for now, before, after in (
        (fleet, [], ["i0"]),
        ([*fleet[:300], *fleet[301:]], ["i300"], []),
        ([*fleet[301:], *fleet[:300]], [], []),
        ([replace(fleet[0], api_key="key"), *fleet[1:300], *fleet[301:]], ["i0"], ["i0"]),
    ):
        merging.tell("file:a", now)
        settled = merging.settle()
        assert [member.instance.instance_id for member in settled.before] == before
        assert list(settled.after.members) == after
