"""Any history of sources, operators, requests and restarts: nobody is lost, doubled or there unnamed."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_pd_scheduler.admin.moves import move
from vllm_pd_scheduler.admin.saved_changes import AS_CONFIGURED, SavedInstance, Steered, difference
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.discovery import ADMIN
from vllm_pd_scheduler.fleet.registry import DuplicateInstance
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import By, InstanceRole, PDInstance
from vllm_pd_scheduler.router import PDRouter

SOURCES = ("dns:a:1", "docker", "kubernetes:llm/pool/chat")
CONFIG: dict[str, Any] = {"discovery": [{"type": "dns", "role": "decode", "name": "a", "port": 1}]}


def _instance(number: int) -> PDInstance:
    role = InstanceRole.PREFILL if number % 2 else InstanceRole.DECODE
    return PDInstance(f"i{number}", role, f"10.0.0.{number}", 1)


FLEET = [_instance(number) for number in range(5)]
SETS = st.sets(st.sampled_from(FLEET), max_size=5)
ONE = st.sampled_from(FLEET)


class Histories(RuleBasedStateMachine):
    """Each instance has one id and one place, so that what should be there is simple to say."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, set[PDInstance]] = {}
        self.silent: set[str] = set()
        self.added: set[PDInstance] = set()
        self.removed: set[PDInstance] = set()
        self.drained: set[str] = set()
        self.running: list[Reservation] = []
        self.begin()

    def begin(self) -> None:
        self.router = PDRouter(parse_config(CONFIG))
        for source in self.silent:
            self.router.membership.expect(source)

    @property
    def named(self) -> set[PDInstance]:
        return set().union(*(found for source, found in self.told.items() if source not in self.silent))

    @property
    def wanted(self) -> set[PDInstance]:
        return (self.named - self.removed) | self.added

    @rule(source=st.sampled_from(SOURCES), found=SETS)
    def tells(self, source: str, found: set[PDInstance]) -> None:
        self.silent.discard(source)
        self.told[source] = found
        self.router.membership.update(source, sorted(found, key=lambda each: each.instance_id))
        self.prune()

    def prune(self) -> None:
        if not self.silent:
            self.removed &= self.named

    @rule(source=st.sampled_from(SOURCES))
    def is_no_more(self, source: str) -> None:
        if source in self.told:
            self.silent.discard(source)
            del self.told[source]
            self.router.membership.forget(source)
            self.prune()

    @rule(one=ONE)
    def operators_add(self, one: PDInstance) -> None:
        try:
            self.router.register_instance(one)
        except DuplicateInstance:
            assert one in self.wanted
        else:
            assert one not in self.wanted
            self.added.add(one)
            self.removed.discard(one)

    @rule(one=ONE)
    def operators_remove(self, one: PDInstance) -> None:
        if self.there(one):
            self.router.unregister_instance(one.instance_id)
            self.added.discard(one)
            self.drained.discard(one.instance_id)
            if one in self.named:
                self.removed.add(one)

    @rule(one=ONE)
    def operators_drain(self, one: PDInstance) -> None:
        if self.there(one):
            self.router.drain_instance(one.instance_id)
            self.drained.add(one.instance_id)

    @rule(one=ONE)
    def operators_undrain(self, one: PDInstance) -> None:
        if self.there(one):
            self.router.undrain_instance(one.instance_id)
            self.drained.discard(one.instance_id)

    @rule(one=ONE)
    def a_request_begins(self, one: PDInstance) -> None:
        if self.there(one):
            registry = self.router.registry
            self.running.append(registry.work.reserve(registry.get(one.instance_id)))

    @rule(index=st.integers(0, 9))
    def a_request_ends(self, index: int) -> None:
        if self.running:
            self.running.pop(index % len(self.running)).release()
            self.router.registry.tell_drained()

    @rule()
    def the_scheduler_restarts(self) -> None:
        """With what the admin interface keeps of the one before; sources are silent then."""
        added = [SavedInstance.of(each) for each in self.added]
        state = difference(Steered.of(self.router, added), self.router.config)
        gone = {name for name in self.drained if not self.known(name)}
        self.silent = set(self.told)
        self.running = []
        self.begin()
        _, problems = move(AS_CONFIGURED, state, self.router, By.START)
        assert not problems
        self.drained -= gone

    def known(self, name: str) -> bool:
        """Whether a drain of an instance is kept: not of one that only leaves."""
        (one,) = (each for each in FLEET if each.instance_id == name)
        return one in self.wanted or not self.there(one)

    def there(self, one: PDInstance) -> bool:
        return any(endpoint.id == one.instance_id for endpoint in self.router.registry)

    @invariant()
    def who_should_is_there_and_nobody_else(self) -> None:
        registry, membership = self.router.registry, self.router.membership
        places = [endpoint.instance.place for endpoint in registry]
        assert len(places) == len(set(places))
        assert membership.refused == ()
        stay = {endpoint.instance for endpoint in registry if not membership.leaves(endpoint.id)}
        assert stay == self.wanted
        for endpoint in registry:
            leaves = membership.leaves(endpoint.id)
            assert endpoint.in_flight or not leaves, "it has nothing to do, and is named by nobody"
            assert endpoint.draining is (leaves or endpoint.id in self.drained)
            assert (ADMIN in membership.sources(endpoint.id)) is (endpoint.instance in self.added)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
