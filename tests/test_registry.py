"""The registry: what each call does, and what holds whatever the order of calls."""

import unittest

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole, InstanceState, MetricsSnapshot, PDInstance, RequestContext
from vllm_pd_scheduler.registry import (
    DuplicateInstance,
    Endpoint,
    HealthPolicy,
    Registry,
    Reservation,
    UnknownInstance,
)
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.xds import HealthStatus, load_assignment

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def instance(
    name: str = "d0", role: InstanceRole = D, host: str = "10.0.0.1", port: int = 8200
) -> PDInstance:
    return PDInstance(name, role, host, port)


def loaded(running: float = 0.0, waiting: float = 0.0) -> MetricsSnapshot:
    return MetricsSnapshot(0.0, running, waiting)


class MembershipTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        self.changes = 0
        self.registry.subscribe(self.count)

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

    def test_unknown_ids(self) -> None:
        for call in (self.registry.get, self.registry.remove, self.registry.drain):
            with self.assertRaises(UnknownInstance) as caught:
                call("nobody")
            self.assertEqual(str(caught.exception), "no instance has the id 'nobody'")

    def test_removal_and_return(self) -> None:
        old = self.registry.add(instance())
        self.registry.probed(old, None)
        held = self.registry.reserve(old)
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
        held = self.registry.reserve(endpoint)
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
        self.registry.resolved(endpoint, "10.0.0.9")
        self.assertEqual((endpoint.address, self.changes), ("10.0.0.9:8200", before + 1))

    def test_contains_takes_anything(self) -> None:
        self.assertNotIn("d0", self.registry)
        self.assertNotIn(Endpoint(instance()), self.registry)


class ProbesTest(unittest.TestCase):
    def states(self, policy: HealthPolicy, probes: str) -> str:
        """State after each probe: '+' a success, '-' a failure; 'H' healthy, 'u' not."""
        registry = Registry(policy)
        endpoint = registry.add(instance())
        seen = ""
        for probe in probes:
            registry.probed(endpoint, None if probe == "+" else "down")
            seen += "H" if endpoint.routable else "u"
            self.assertEqual(endpoint.routable, registry.routable(D) == (endpoint,))
        return seen

    def test_thresholds(self) -> None:
        cases = [
            # unhealthy, healthy, probes, states
            (2, 1, "+-+--+-", "HHHHuHH"),
            (1, 1, "+-+-", "HuHu"),
            (3, 1, "+--+---", "HHHHHHu"),
            (1, 3, "+-++-+++", "Huuuuuu" + "H"),
            (2, 2, "-+-++--", "uuuuHHu"),
            (5, 5, "-", "u"),  # the first probe decides alone
            (5, 5, "+", "H"),
        ]
        for unhealthy, healthy, probes, states in cases:
            with self.subTest(probes, unhealthy=unhealthy, healthy=healthy):
                self.assertEqual(self.states(HealthPolicy(unhealthy, healthy), probes), states)

    def test_listeners_hear_of_changes_only(self) -> None:
        registry = Registry()
        endpoint = registry.add(instance())
        heard: list[InstanceState] = []
        registry.subscribe(lambda: heard.append(endpoint.state))
        for problem in (None, None, "x", None, "x", "x", "x", None):
            registry.probed(endpoint, problem)
        self.assertEqual(heard, [InstanceState.HEALTHY, InstanceState.UNHEALTHY, InstanceState.HEALTHY])

    def test_the_reason_is_the_last_probe(self) -> None:
        registry = Registry()
        endpoint = registry.add(instance())
        self.assertEqual(endpoint.reason, "not probed yet")
        registry.probed(endpoint, "/health answers 503")
        self.assertEqual(endpoint.reason, "/health answers 503")
        registry.probed(endpoint, None)
        self.assertEqual(endpoint.reason, "")


class LoadTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        self.endpoint = self.registry.add(instance())

    def test_a_release_counts_once(self) -> None:
        one, two = self.registry.reserve(self.endpoint), self.registry.reserve(self.endpoint)
        self.assertEqual(self.endpoint.in_flight, 2)
        for _ in range(3):
            one.release()
        self.assertEqual(self.endpoint.in_flight, 1)
        two.release()
        self.assertEqual(self.endpoint.in_flight, 0)

    def test_without_a_scrape_only_ours_count(self) -> None:
        self.registry.reserve(self.endpoint)
        self.assertEqual((self.endpoint.waiting, self.endpoint.requests), (1.0, 1.0))
        self.assertEqual((self.endpoint.kv_usage, self.endpoint.latency), (0.0, None))

    def test_what_was_sent_since_the_scrape_counts_at_once(self) -> None:
        held = [self.registry.reserve(self.endpoint) for _ in range(4)]
        self.registry.scraped(self.endpoint, loaded(running=3, waiting=1), 4)
        self.assertEqual((self.endpoint.waiting, self.endpoint.requests), (1.0, 4.0))
        held += [self.registry.reserve(self.endpoint) for _ in range(2)]
        self.assertEqual((self.endpoint.waiting, self.endpoint.requests), (3.0, 6.0))
        for reservation in held:
            reservation.release()
        self.assertEqual((self.endpoint.waiting, self.endpoint.requests), (0.0, 0.0))

    def test_requests_of_another_scheduler_count_too(self) -> None:
        self.registry.reserve(self.endpoint)
        self.registry.scraped(self.endpoint, loaded(running=5, waiting=2), 1)
        self.assertEqual(self.endpoint.requests, 7.0)
        self.registry.reserve(self.endpoint)
        self.assertEqual(self.endpoint.requests, 8.0)

    def test_a_scrape_that_saw_less_than_we_know_of(self) -> None:
        for _ in range(3):
            self.registry.reserve(self.endpoint)
        self.registry.scraped(self.endpoint, loaded(running=1), 3)
        self.assertEqual(self.endpoint.requests, 3.0)


BLOCKS = tuple(range(1, 9))


def prompt(tokens: float = 1000.0, now: float = 0.0, registry: Registry | None = None) -> RequestContext:
    """A request; with a registry, one whose blocks may be cached somewhere."""
    request = RequestContext("/", prompt_tokens=tokens, output_tokens=100.0, now=now)
    if registry is not None:
        request.blocks, request.block_tokens = BLOCKS, tokens / len(BLOCKS)
        request.look_up_in(registry.prefixes)
    return request


class WorkTest(unittest.TestCase):
    """Reservations that know what they bring, and what is learned when they end."""

    def setUp(self) -> None:
        self.registry = Registry()
        self.p0 = self.registry.add(instance("p0", P))
        self.d0 = self.registry.add(instance("d0", D))

    def prefill(self, tokens: int, start: float, seconds: float, cached: int | None = 0) -> None:
        reservation = self.registry.reserve(self.p0, prompt(float(tokens), start))
        self.registry.prefilled(reservation, tokens, cached, start + seconds)

    def test_what_a_request_brings(self) -> None:
        self.registry.reserve(self.p0, prompt(now=5.0))
        self.registry.reserve(self.d0, prompt(now=5.0))
        self.assertEqual((self.p0.tokens, self.d0.tokens), (1000.0, 1100.0))
        cost = self.p0.prefill.cost(1000.0, 1000.0)
        self.assertEqual((self.p0.prefill.left(5.0), self.d0.prefill.queued), (cost, 0.0))
        second = self.registry.reserve(self.p0, prompt(now=5.01))
        self.assertAlmostEqual(second.wait, cost - 0.01)

    def test_cached_tokens_bring_no_work_but_one_token(self) -> None:
        self.registry.reserve(self.p0, prompt(registry=self.registry))
        again = self.registry.reserve(self.p0, prompt(registry=self.registry))
        self.assertEqual((again.cached, again.tokens), (1000.0, 1.0))
        self.p0.prefill.trust = 0.25
        third = self.registry.reserve(self.p0, prompt(registry=self.registry))
        self.assertEqual((third.cached, third.tokens), (1000.0, 750.0))

    def test_what_only_a_reservation_reads_is_of_the_time_before_it(self) -> None:
        first = self.registry.reserve(self.p0, prompt(registry=self.registry))
        self.assertEqual((first.cached, first.tokens), (0.0, 1000.0))

    def test_it_learns_from_what_a_prefill_took(self) -> None:
        for number in range(60):
            tokens = 1000 + 100 * number
            self.prefill(tokens, 100.0 * number, 0.05 + tokens * 1e-3)
        self.assertAlmostEqual(self.p0.prefill.cost(4000, 4000), 4.05, delta=0.1)
        newcomer = self.registry.add(instance("p1", P, port=1))
        self.assertAlmostEqual(newcomer.prefill.cost(4000, 4000), 4.05, delta=0.1)

    def test_those_that_were_never_used_follow_the_fleet(self) -> None:
        """Else the first that is found to be fast would get all, or one that is slow nothing."""
        p1, d1 = self.registry.add(instance("p1", P, port=1)), self.registry.add(instance("d1", port=1))
        for number in range(30):
            self.prefill(1000, float(number), 0.5)
            self.registry.scraped(self.d0, MetricsSnapshot(float(number), running=4.0, step_time=0.001), 0)
        self.assertAlmostEqual(p1.prefill.cost(1000, 1000), 0.5, delta=0.02)
        self.assertAlmostEqual(d1.decode.step(4, 0), self.d0.decode.step(4, 0), delta=1e-4)
        own = self.registry.reserve(p1, prompt(now=100.0))
        self.registry.prefilled(own, 1000, 0, 102.0)
        before = p1.prefill.cost(1000, 1000)
        self.prefill(1000, 200.0, 0.5)
        self.assertEqual(p1.prefill.cost(1000, 1000), before, "it knows itself now")

    def test_it_learns_whether_prefixes_are_cached(self) -> None:
        for _ in range(40):
            reservation = self.registry.reserve(self.p0, prompt(registry=self.registry))
            self.registry.prefilled(reservation, 1000, 0, 1.0)
        self.assertLess(self.p0.prefill.trust, 0.05)
        for told in (None, -5):  # it does not say, or nonsense
            reservation = self.registry.reserve(self.p0, prompt(registry=self.registry))
            self.registry.prefilled(reservation, 1000, told, 1.0)
        self.assertTrue(0.0 <= self.p0.prefill.trust < 0.05)

    def test_a_prefill_that_costs_nothing_leaves_nothing(self) -> None:
        load = self.p0.prefill
        load.overhead = load.per_token = load.per_pair = 0.0
        free = self.registry.reserve(self.p0, prompt())
        load.overhead = 1.0
        other = self.registry.reserve(self.p0, prompt())
        free.release(0.0)
        self.assertEqual(load.left(0.5), 0.5, "the other is under way")
        other.release(1.0)
        self.assertEqual((load.queued, load.left(1.0), len(load._pending)), (0.0, 0.0, 0))

    def test_a_prefill_that_failed_teaches_nothing(self) -> None:
        before = self.p0.prefill.cost(1000, 1000)
        for number in range(20):
            self.registry.reserve(self.p0, prompt(now=float(number))).release(number + 0.9)
        self.assertEqual(self.p0.prefill.cost(1000, 1000), before)

    def test_a_restart(self) -> None:
        held = [self.registry.reserve(self.p0, prompt(registry=self.registry)) for _ in range(2)]
        self.assertFalse(self.registry.started(self.p0, 1.0), "the first time tells nothing")
        self.assertIn(self.p0.holder, self.registry.prefixes.match(BLOCKS))
        self.assertTrue(self.registry.started(self.p0, 2.0))
        self.assertEqual(self.registry.prefixes.match(BLOCKS), {})
        self.assertEqual((self.p0.in_flight, self.p0.tokens, self.p0.prefill.queued), (0, 0.0, 0.0))
        new = self.registry.reserve(self.p0, prompt())
        self.registry.prefilled(held[0], 1000, 0, 3.0)
        held[1].release(3.0)
        self.assertEqual((self.p0.in_flight, self.p0.tokens), (1, 1000.0))
        new.release(4.0)
        self.assertEqual(self.p0.prefill.fit.samples, 0)

    def test_tokens_of_the_cache(self) -> None:
        self.registry.reserve(self.d0, prompt())
        self.assertEqual(self.d0.kv_tokens, 1100.0, "before any scrape, ours")
        self.registry.scraped(self.d0, MetricsSnapshot(0.0, kv_usage=0.5, kv_capacity=10_000.0), 1, 1100.0)
        self.assertEqual(self.d0.kv_tokens, 5000.0, "others have the rest of what was seen")
        self.registry.reserve(self.d0, prompt())
        self.assertEqual(self.d0.kv_tokens, 6100.0)
        self.registry.scraped(self.d0, MetricsSnapshot(1.0, kv_usage=0.0), 2, 2200.0)
        self.assertEqual(self.d0.kv_tokens, 2200.0, "ours, also if they have not come there yet")

    def test_the_index_holds_what_the_instance_has_room_for(self) -> None:
        request = prompt(registry=self.registry)
        self.registry.block_tokens = request.block_tokens
        self.registry.reserve(self.p0, request)
        self.registry.scraped(self.p0, MetricsSnapshot(0.0, kv_capacity=4 * request.block_tokens), 1)
        self.assertEqual(len(self.p0.holder), 4)

    def test_one_odd_prompt_does_not_resize_every_index(self) -> None:
        usual = MetricsSnapshot(0.0, kv_capacity=256_000.0)
        self.registry.scraped(self.p0, usual, 0)
        before = self.p0.holder.capacity
        for block_tokens in (1e-3, 1024.0):
            odd = prompt(registry=self.registry)
            odd.block_tokens = block_tokens
            self.registry.reserve(self.d0, odd)
            self.registry.scraped(self.p0, usual, 0)
            self.assertTrue(before / 2 < self.p0.holder.capacity < before * 2)

    def test_scrapes_are_told(self) -> None:
        heard: list[str] = []
        self.registry.on_scraped = lambda: heard.append("scraped")
        self.registry.scraped(self.p0, loaded(), 0)
        self.assertEqual(heard, ["scraped"])

    def test_only_scrapes_of_decode_teach(self) -> None:
        snapshot = MetricsSnapshot(0.0, step_time=9.0, output_tokens=9e3, finished=1.0, transfer=9.0)
        load = self.registry.load
        before = (load.transfer, load.output_tokens)
        for _ in range(3):
            self.registry.scraped(self.p0, snapshot, 0)
        self.assertEqual((load.decode.samples, load.transfer, load.output_tokens), (0, *before))
        for _ in range(3):  # nothing ran: there is nothing that a step could be of
            self.registry.scraped(self.d0, snapshot, 0)
        self.assertEqual(load.decode.samples, 0)
        self.assertGreater(load.transfer, 1.0)
        self.assertGreater(load.output_tokens, 1000.0)


IDS = [f"i{n}" for n in range(4)]


class RegistryMachine(RuleBasedStateMachine):
    """Any order of calls, as health loops, admin calls and requests make them."""

    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(HealthPolicy(2, 2))
        self.scheduler = Scheduler(SchedulerConfig(), self.registry)
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

    @rule(target=reservations, role=st.sampled_from(list(InstanceRole)), count=st.integers(1, 3))
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
        self.open.append(self.registry.reserve(picked[0], request if count < 3 else None))
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
                self.registry.prefilled(reservation, 100, 50, self.now)
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
            assert endpoint.prefill.left(self.now) >= 0.0

    @invariant()
    def routable_is_up_to_date(self) -> None:
        for role in InstanceRole:
            expected = [e for e in self.registry.endpoints(role) if e.routable]
            assert list(self.registry.routable(role)) == expected

    @invariant()
    def envoy_is_told_the_same(self) -> None:
        for role in InstanceRole:
            told = load_assignment(self.registry, role).endpoints[0].lb_endpoints
            expected = [e for e in self.registry.endpoints(role) if e.address is not None]
            assert len(told) == len(expected)
            for lb, endpoint in zip(told, expected, strict=True):
                socket = lb.endpoint.address.socket_address
                assert f"{socket.address}:{socket.port_value}" == endpoint.address
                assert lb.metadata.filter_metadata["vllm_pd"].fields["id"].string_value == endpoint.id
                assert (lb.health_status == HealthStatus.HEALTHY) == endpoint.routable

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
