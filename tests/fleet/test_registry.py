"""The registry: what each call does, and what holds whatever the order of calls."""

import unittest
from functools import partial

from envoy.config.core.v3 import health_check_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.support.registry import BLOCKS, D, P, instance, loaded, prompt
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.envoy.load_assignment import LoadAssignment
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import DuplicateInstance, HealthPolicy, Registry, UnknownInstance
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, InstanceState
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler


class MembershipTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        self.changes = 0
        self.registry.changes.subscribe(self.count)

    def count(self) -> None:
        self.changes += 1

    def test_a_new_instance_takes_nothing_before_its_first_probe(self) -> None:
        endpoint = self.registry.add(instance())
        self.assertIs(endpoint.state, InstanceState.STARTING)
        self.assertFalse(endpoint.routable)
        self.assertEqual(endpoint.address, "10.0.0.1:8200")
        self.assertEqual(self.registry.routable(D), ())
        self.registry.probed(endpoint, None)
        self.assertIs(endpoint.state, InstanceState.HEALTHY)
        self.assertEqual(self.registry.routable(D), (endpoint,))
        self.assertEqual(self.registry.routable(P), ())

    def test_order_and_roles(self) -> None:
        names = ["b", "a", "c"]
        for port, name in enumerate(names, 1):
            self.registry.add(instance(name, port=port))
            self.registry.add(instance("p" + name, P, port=port))
        self.assertEqual([e.id for e in self.registry.endpoints(D)], names)
        self.assertEqual([e.id for e in self.registry.endpoints(P)], ["pb", "pa", "pc"])
        self.assertEqual([e.id for e in self.registry], ["b", "pb", "a", "pa", "c", "pc"])
        self.assertEqual(len(self.registry.endpoints()), 6)

    def test_doubles(self) -> None:
        self.registry.add(instance("d0"))
        with self.assertRaisesRegex(DuplicateInstance, "the id 'd0' is taken"):
            self.registry.add(instance("d0", port=1))
        with self.assertRaisesRegex(DuplicateInstance, "10.0.0.1:8200 is already the decode instance 'd0'"):
            self.registry.add(instance("d1"))
        self.registry.add(instance("p0", P))  # the same server in the other role
        self.assertEqual([e.id for e in self.registry], ["d0", "p0"])
        self.assertEqual(self.changes, 2)

    def test_doubles_in_another_spelling(self) -> None:
        for one, other in (
            ("::1", "0:0:0:0:0:0:0:1"),
            ("::1", "[::1]"),
            ("10.0.0.1", "::ffff:10.0.0.1"),
            ("fd00::a", "FD00:0:0::A"),
            ("vllm-0", "VLLM-0"),
            ("vllm-0.pool", "vllm-0.pool."),
        ):
            for first, second in ((one, other), (other, one)):
                with self.subTest(first, second=second), self.assertRaises(DuplicateInstance):
                    registry = Registry()
                    registry.add(instance("d0", host=first))
                    registry.add(instance("d1", host=second))

    def test_an_address_is_as_envoy_tells_it(self) -> None:
        endpoint = self.registry.add(instance("d0", host="FD00:0:0::A"))
        self.assertEqual(endpoint.address, "[fd00::a]:8200")
        self.assertIs(self.registry.at(D, "[fd00::a]:8200"), endpoint)

    def test_two_names_of_one_address(self) -> None:
        """They are one server: reports are of the first added, and failures count for both."""
        d0, d1 = (self.registry.add(instance(f"d{n}", host=f"vllm-{n}")) for n in range(2))
        self.assertIsNone(self.registry.at(D, "10.0.0.9:8200"))
        self.registry.resolved(d1, "10.0.0.9")
        self.assertIs(self.registry.at(D, "10.0.0.9:8200"), d1)
        self.registry.resolved(d0, "10.0.0.9")
        self.assertIs(self.registry.at(D, "10.0.0.9:8200"), d0)
        self.assertIsNone(self.registry.at(P, "10.0.0.9:8200"))
        self.registry.resolved(d0, "10.0.0.8")
        self.assertIs(self.registry.at(D, "10.0.0.9:8200"), d1)
        self.registry.resolved(d0, "10.0.0.9")
        self.registry.remove("d0")
        self.assertIs(self.registry.at(D, "10.0.0.9:8200"), d1)

    def test_one_server_of_two_names_is_ejected_as_one(self) -> None:
        d0, d1, d2, p0 = (
            self.registry.add(instance(name, role, f"vllm-{name}"))
            for name, role in (("d0", D), ("d1", D), ("d2", D), ("p0", P))
        )
        for endpoint, last in ((d0, 9), (d1, 9), (d2, 8), (p0, 9)):
            self.registry.resolved(endpoint, f"10.0.0.{last}")
            self.registry.probed(endpoint, None)
        for _ in range(3):
            self.registry.ends.failed(d0, "decode: reset", 0.0)
        self.assertEqual([e.ejected for e in (d0, d1, d2, p0)], [True, True, False, False])
        self.registry.resolved(d1, "10.0.0.7")
        self.assertEqual((d0.ejected, d1.ejected), (True, False))
        self.registry.resolved(d0, "10.0.0.7")
        self.assertEqual((d0.ejected, d1.ejected), (False, False))

    def test_unknown_ids(self) -> None:
        for call in (self.registry.get, self.registry.remove, self.registry.drain):
            with self.assertRaises(UnknownInstance) as caught:
                call("nobody")
            self.assertEqual(str(caught.exception), "no instance has the id 'nobody'")

    def test_removal_and_return(self) -> None:
        old = self.registry.add(instance())
        self.registry.probed(old, None)
        held = self.registry.work.reserve(old)
        self.assertIs(self.registry.remove("d0"), old)
        self.assertNotIn(old, self.registry)
        self.assertFalse(old.routable)
        self.assertEqual(self.registry.routable(D), ())
        new = self.registry.add(instance())
        self.assertIsNot(new, old)
        self.assertIn(new, self.registry)
        self.assertNotIn(old, self.registry)
        self.registry.probed(old, None)  # a probe that was under way
        self.assertIs(new.state, InstanceState.STARTING)
        held.release()
        self.assertEqual((old.in_flight, new.in_flight), (0, 0))

    def test_draining(self) -> None:
        endpoint = self.registry.add(instance())
        self.registry.probed(endpoint, None)
        held = self.registry.work.reserve(endpoint)
        before = self.changes
        self.registry.drain("d0")
        self.registry.drain("d0")
        self.assertEqual(self.changes, before + 1)
        self.assertIs(endpoint.state, InstanceState.DRAINING)
        self.assertEqual(self.registry.routable(D), ())
        self.registry.probed(endpoint, "gone")
        self.registry.probed(endpoint, None)
        self.assertIs(endpoint.state, InstanceState.DRAINING)
        self.assertEqual(endpoint.in_flight, 1)
        held.release()
        self.assertEqual(endpoint.in_flight, 0)

    def test_names_wait_for_their_address(self) -> None:
        endpoint = self.registry.add(instance(host="vllm-0"))
        self.registry.probed(endpoint, None)
        self.assertIsNone(endpoint.address)
        self.assertEqual(self.registry.routable(D), ())
        self.registry.resolved(endpoint, "::1")
        self.assertEqual(endpoint.address, "[::1]:8200")
        self.assertEqual(self.registry.routable(D), (endpoint,))
        before = self.changes
        self.registry.resolved(endpoint, "::1")
        self.assertEqual(self.changes, before)
        self.registry.resolved(endpoint, "10.0.0.9", 7.0)
        self.assertEqual((endpoint.address, self.changes), ("10.0.0.9:8200", before + 1))
        self.assertEqual(endpoint.resolved_at, 7.0)

    def test_contains_takes_anything(self) -> None:
        self.assertNotIn("d0", self.registry)
        self.assertNotIn(Endpoint(instance()), self.registry)


IDS = [f"i{n}" for n in range(4)]


class RegistryMachine(RuleBasedStateMachine):
    """Any order of calls, as health loops, admin calls and requests make them."""

    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(HealthPolicy(2, 2))
        self.scheduler = Scheduler(SchedulerConfig(), self.registry)
        self.assignments = {
            role: LoadAssignment(role.value, partial(self.registry.endpoints, role)) for role in InstanceRole
        }
        self.known: dict[Endpoint, int] = {}  # every endpoint ever, and what we hold on it
        self.ever_drained: set[Endpoint] = set()
        self.open: list[Reservation] = []
        self.now = 0.0

    @rule(name=st.sampled_from(IDS), role=st.sampled_from(list(InstanceRole)), dns=st.booleans())
    def add(self, name: str, role: InstanceRole, dns: bool) -> None:
        number = IDS.index(name)
        host = f"host{number}" if dns else f"10.0.0.{number}"
        if name in {e.id for e in self.registry}:
            try:
                self.registry.add(instance(name, role, host))
            except DuplicateInstance:
                return
            raise AssertionError("a double was taken")
        self.known[self.registry.add(instance(name, role, host))] = 0

    @rule(name=st.sampled_from(IDS))
    def remove(self, name: str) -> None:
        try:
            self.registry.remove(name)
        except UnknownInstance:
            assert name not in {e.id for e in self.registry}

    @rule(name=st.sampled_from(IDS))
    def drain(self, name: str) -> None:
        try:
            self.ever_drained.add(self.registry.drain(name))
        except UnknownInstance:
            assert name not in {e.id for e in self.registry}

    @rule(number=st.integers(0, 30), problem=st.sampled_from([None, None, "down"]))
    def probe(self, number: int, problem: str | None) -> None:
        """Also of an endpoint that was removed meanwhile."""
        if self.known:
            self.registry.probed(list(self.known)[number % len(self.known)], problem)

    @rule(number=st.integers(0, 30), last=st.integers(1, 9))
    def resolve(self, number: int, last: int) -> None:
        if self.known:
            endpoint = list(self.known)[number % len(self.known)]
            if endpoint.instance.host.startswith("host"):
                self.registry.resolved(endpoint, f"10.1.{number}.{last}")

    @rule(number=st.integers(0, 30), load=st.integers(0, 5))
    def scrape(self, number: int, load: int) -> None:
        if self.known:
            endpoint = list(self.known)[number % len(self.known)]
            self.registry.scraped(endpoint, loaded(load, load), endpoint.in_flight)

    @rule(target=reservations, role=st.sampled_from(list(PD_ROLES)), count=st.integers(1, 3))
    def reserve(self, role: InstanceRole, count: int) -> Reservation | None:
        picked = self.scheduler.pick(role, RequestContext("/"), count=count)
        assert bool(picked) == bool(self.registry.routable(role))
        for endpoint in picked:
            assert endpoint in self.registry
            assert endpoint.instance.role is role
            assert endpoint.state is InstanceState.HEALTHY
            assert endpoint.address is not None
            assert endpoint not in self.ever_drained
        if not picked:
            return None
        self.known[picked[0]] += 1
        request = prompt(100.0 * count, self.now, self.registry)
        self.open.append(self.registry.work.reserve(picked[0], request if count < 3 else None))
        return self.open[-1]

    @rule(reservation=consumes(reservations), times=st.integers(1, 2))
    def release(self, reservation: Reservation | None, times: int) -> None:
        if reservation is not None:
            self.ended(reservation)
            for _ in range(times):
                reservation.release()

    def ended(self, reservation: Reservation) -> None:
        if reservation.generation == reservation.endpoint.generation:
            self.known[reservation.endpoint] -= 1

    @rule(reservation=consumes(reservations), seconds=st.floats(0, 3))
    def prefilled(self, reservation: Reservation | None, seconds: float) -> None:
        self.now += seconds
        if reservation is not None:
            self.ended(reservation)
            if reservation.endpoint.instance.role is P:
                self.registry.work.prefilled(reservation, 100, 50, self.now)
            reservation.release(self.now)

    @rule(number=st.integers(0, 30))
    def restart(self, number: int) -> None:
        if self.known:
            endpoint = list(self.known)[number % len(self.known)]
            self.now += 1.0
            if self.registry.started(endpoint, self.now):
                self.known[endpoint] = 0
                assert endpoint.holder not in self.registry.prefixes.match(BLOCKS)

    @invariant()
    def in_flight_is_what_is_held(self) -> None:
        for endpoint, held in self.known.items():
            assert endpoint.in_flight == held
            assert endpoint.waiting >= 0
            assert endpoint.requests >= held
            assert endpoint.tokens >= 0.0
            assert endpoint.kv_tokens >= endpoint.tokens
            assert endpoint.prefill.remaining(self.now) >= 0.0

    @invariant()
    def routable_is_up_to_date(self) -> None:
        for role in PD_ROLES:
            expected = [e for e in self.registry.endpoints(role) if e.routable]
            assert list(self.registry.routable(role)) == expected

    @invariant()
    def envoy_is_told_the_same(self) -> None:
        for role, assignment in self.assignments.items():
            assignment.refresh()
            message = endpoint_pb2.ClusterLoadAssignment.FromString(assignment.resource.value)
            told = message.endpoints[0].lb_endpoints
            expected = [e for e in self.registry.endpoints(role) if e.address is not None]
            assert len(told) == len(expected)
            for lb, endpoint in zip(told, expected, strict=True):
                socket = lb.endpoint.address.socket_address
                assert f"{socket.address}:{socket.port_value}" == endpoint.address
                assert lb.metadata.filter_metadata["vllm_pd"].fields["id"].string_value == endpoint.id
                assert (lb.health_status == health_check_pb2.HEALTHY) == endpoint.routable

    def teardown(self) -> None:
        """Whatever happened, once every request has ended nothing is in flight."""
        for reservation in self.open:
            reservation.release()
        for endpoint in self.known:
            assert (endpoint.in_flight, endpoint.tokens, endpoint.prefill.queued) == (0, 0.0, 0.0)


RegistryMachine.TestCase.settings = settings(
    derandomize=True, deadline=None, max_examples=60, stateful_step_count=40
)
AnyOrderTest = RegistryMachine.TestCase


if __name__ == "__main__":
    unittest.main()
