"""What replicas tell each other of the instances that they probe."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.replicas import SILENT_S, Disbelieved, FleetKey, Ignored, Replica
from vllm_pd_scheduler.replicas.message import MAX_FOUND_BYTES, Found, Message
from vllm_pd_scheduler.replicas.rendezvous import first

KEY = FleetKey("fleet")
INSTANCES = 20


@dataclass
class Heard:
    """Notes what it is told, and finds nothing wrong with it but the word ``nonsense``."""

    asked_of: list[tuple[str, str]] = field(default_factory=list)
    told: list[tuple[str, str, bytes]] = field(default_factory=list)

    def asked(self, endpoint: Endpoint, by: str) -> None:
        self.asked_of.append((endpoint.id, by))

    def found(self, endpoint: Endpoint, by: str, told: bytes) -> bool:
        self.told.append((endpoint.id, by, told))
        return told != b"nonsense"


class One:
    """A replica and its listener."""

    def __init__(self, name: str, ranks: int = 1) -> None:
        self.registry, self.heard = Registry(), Heard()
        for number in range(INSTANCES):
            host = f"10.0.0.{number + 1}"
            self.registry.add(
                PDInstance(f"d{number}", InstanceRole.DECODE, host, 8000, data_parallel_size=ranks)
            )
        self.replica = Replica(self.registry, name, KEY)
        self.replica.probes.listener = self.heard

    def firsts(self) -> list[Endpoint]:
        return [ranks[0] for ranks in self.registry.instances()]

    def ours(self) -> set[str]:
        return {each.instance.instance_id for each in self.firsts() if self.replica.probes.ours(each)}

    def tell_of_all(self, found: bytes = b"well") -> None:
        for each in self.firsts():
            self.replica.probes.asks(each)
            self.replica.probes.finds(each, found)


def exchange(*ones: One, now: float) -> None:
    """Have each tell all others what it has to tell."""
    for one in ones:
        for data in one.replica.publish(now):
            for other in ones:
                other.replica.receive(data, now)


def test_each_instance_is_one_s_and_what_it_finds_is_told_once() -> None:
    a, b = One("a"), One("b")
    exchange(a, b, now=1.0)
    exchange(a, b, now=1.1)
    assert a.ours() | b.ours() == {f"d{number}" for number in range(INSTANCES)}
    assert not a.ours() & b.ours()
    a.tell_of_all()
    exchange(a, b, now=1.2)
    exchange(a, b, now=1.3)
    assert {name for name, *_ in b.heard.told} == a.ours(), "nothing of those that are not its own"
    assert len(b.heard.told) == len(a.ours())
    assert set(b.heard.told) == {(name, "a", b"well") for name in a.ours()}
    assert {name for name, _ in b.heard.asked_of} == a.ours()
    assert not a.heard.told


def test_ranks_are_one_instance() -> None:
    a, b = One("a", ranks=2), One("b", ranks=2)
    exchange(a, b, now=1.0)
    a.tell_of_all()
    exchange(a, b, now=1.2)
    assert {name for name, *_ in b.heard.told} == {f"{name}:0" for name in a.ours()}


def test_alone_it_probes_all_and_tells_nothing() -> None:
    a, b = One("a"), One("b")
    a.tell_of_all()
    exchange(a, now=1.0)
    assert not a.replica.probes.untold
    assert len(a.ours()) == INSTANCES
    exchange(a, b, now=2.0)
    assert len(b.ours()) < INSTANCES
    exchange(b, now=2.0 + SILENT_S)
    assert len(b.ours()) == INSTANCES, "a is gone"


def test_what_is_to_be_told_is_told_with_the_next_message() -> None:
    a, b = One("a"), One("b")
    exchange(a, b, now=1.0)
    exchange(a, b, now=1.01)
    woken = []
    a.replica.probes.wake = lambda: woken.append(True)
    a.tell_of_all()
    assert woken
    assert a.replica.next_publish(1.1) == 1.1


def test_only_the_first_two_may_tell() -> None:
    ones = [One(name) for name in "abcd"]
    for now in (1.0, 1.1):
        exchange(*ones, now=now)
    a = ones[0]
    liar = Message(
        "b", 100, False, (0, 0), [f"d{number}" for number in range(INSTANCES)],
        probing=list(range(INSTANCES)), found=[Found(number, b"lie") for number in range(INSTANCES)],
    )  # fmt: skip
    assert a.replica.receive(KEY.encode(liar), 1.2)
    its = {f"d{number}" for number in range(INSTANCES) if "b" in first(f"d{number}", "abcd", 2)}
    assert {name for name, *_ in a.heard.told} == its
    assert {name for name, _ in a.heard.asked_of} == its


def test_nonsense_is_counted_and_takes_nothing_with_it() -> None:
    a, b = One("a"), One("b")
    exchange(a, b, now=1.0)
    exchange(a, b, now=1.1)
    a.tell_of_all(b"nonsense")
    a.registry.work.reserve(a.registry.get("d0"))
    exchange(a, b, now=1.2)
    assert b.replica.disbelieved == {Disbelieved.FINDINGS: 1}
    assert b.registry.get("d0").elsewhere == 1, "the rest of the message was used"


def test_what_names_no_endpoint_is_garbage_and_what_it_does_not_know_is_nothing() -> None:
    a, b = One("a"), One("b")
    exchange(a, b, now=1.0)
    for number, wrong in enumerate(({"probing": [1]}, {"found": [Found(1, b"")]}), 10):
        data = KEY.encode(Message("a", number, False, (0, 0), ["d0"], **wrong))  # type: ignore[arg-type]
        assert not b.replica.receive(data, 1.1)
    assert b.replica.ignored == {Ignored.GARBAGE: 2}
    assert b.replica.receive(KEY.encode(Message("a", 12, False, (0, 0), ["x"], probing=[0])), 1.1)
    assert not b.heard.asked_of


def test_what_is_told_is_bounded() -> None:
    a, b = One("a"), One("b")
    exchange(a, b, now=1.0)
    exchange(a, b, now=1.01)
    for _ in range(100):
        a.tell_of_all(b"x" * MAX_FOUND_BYTES)
    assert sum(map(len, a.replica.publish(1.1))) < 400_000
    a.tell_of_all(b"x" * (MAX_FOUND_BYTES + 1))
    exchange(a, b, now=1.2)
    assert not b.heard.told
