"""Several schedulers that watch one fleet: each instance is probed by one, which tells what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from tests.support.waiting import until
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import HealthPolicy, Registry
from vllm_pd_scheduler.health import HealthMonitor
from vllm_pd_scheduler.health import monitor as health
from vllm_pd_scheduler.health.names import NameResolver
from vllm_pd_scheduler.health.shared import HEARD_INTERVALS, OWN_LOOK_S
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.replicas import Disbelieved, FleetKey, Replica
from vllm_pd_scheduler.replicas.message import Found, Message
from vllm_pd_scheduler.telemetry import Telemetry

from .instances import Fixture, Server
from .test_vllm_metrics import TWO_ENGINES

KEY = FleetKey("fleet")
INTERVAL_S = 5.0
START = "process_start_time_seconds 1.7e9\n"
IDLE = "vllm:num_requests_running 0\nvllm:num_requests_waiting 2\n"
D, P = InstanceRole.DECODE, InstanceRole.PREFILL


class Scheduler:
    """One replica and what it sees."""

    def __init__(
        self, fleet: Schedulers, name: str, session: aiohttp.ClientSession, interval: float = INTERVAL_S
    ) -> None:
        self.fleet, self.name = fleet, name
        self.registry = Registry(HealthPolicy(unhealthy_threshold=2, healthy_threshold=1))
        self.replica = Replica(self.registry, name, KEY)
        self.hung: list[str] = []
        self.deaf = False
        """Whether it hears nothing, and is not heard."""
        self.addresses: dict[str, list[str]] = {}
        self.monitor = HealthMonitor(
            self.registry,
            Telemetry(),
            session,
            interval=interval,
            timeout=0.5,
            clock=lambda: fleet.now,
            names=NameResolver(lambda host: self.addresses.get(host, ["127.0.0.1"])),
            hung=lambda endpoint: self.hung.append(endpoint.id),
            peers=self.replica.probes,
        )
        self.replica.probes.listener = self.monitor.shared

    def add(self, name: str, port: int, role: InstanceRole, host: str, ranks: int) -> None:
        self.registry.add(PDInstance(name, role, host, port, data_parallel_size=ranks))

    def __getitem__(self, name: str) -> Endpoint:
        return self.registry.get(name)

    async def look(self) -> None:
        """Probe what is for it to probe."""
        for ranks in self.registry.instances():
            if self.monitor.shared.looks(ranks[0]):
                await self.monitor.check(ranks[0])

    def looks(self, name: str) -> bool:
        return self.monitor.shared.looks(self[name])


class Schedulers:
    """Several of them, one clock, and one fleet."""

    def __init__(self, fixture: Fixture) -> None:
        self.now = 100.0
        self.fixture = fixture
        self.all: list[Scheduler] = []
        self.servers: dict[str, Server] = {}

    def join(self, *names: str, interval: float = INTERVAL_S) -> list[Scheduler]:
        new = [Scheduler(self, name, self.fixture.session, interval) for name in names]
        self.all += new
        return new

    async def serve(
        self, name: str, role: InstanceRole = D, host: str = "127.0.0.1", ranks: int = 1, page: str = IDLE
    ) -> Server:
        server = self.servers[name] = await self.fixture.serve(None)
        server.page = START + page
        for one in self.all:
            one.add(name, server.port, role, host, ranks)
        return server

    def exchange(self) -> None:
        """Have all tell all others what there is to tell."""
        for one in self.all:
            for data in one.replica.publish(self.now):
                for other in self.all:
                    if not (one.deaf or other.deaf):
                        other.replica.receive(data, self.now)

    async def rounds(self, count: int = 1) -> None:
        """Let so many intervals pass, each with a look of everybody at what is for it to look at."""
        for _ in range(count):
            for _ in range(5):
                self.now += INTERVAL_S / 5
                self.exchange()
            for one in self.all:
                await one.look()
                self.exchange()

    async def acquaint(self) -> None:
        """Have all look at all, hear of each other, and look at their own."""
        for one in self.all:
            await one.monitor.check_all()
        self.exchange()
        await self.rounds(2)
        for server in self.servers.values():
            server.probes = server.scrapes = 0
            server.authorization.clear()

    def owner(self, name: str) -> Scheduler:
        (found,) = [one for one in self.all if one.replica.probes.ours(one[name])]
        return found

    def other(self, name: str) -> Scheduler:
        return next(one for one in self.all if one is not self.owner(name))


@pytest_asyncio.fixture
async def schedulers(fleet: Fixture) -> AsyncIterator[Schedulers]:
    made = Schedulers(fleet)
    yield made
    for one in made.all:
        await one.monitor.stop()


@pytest.fixture(autouse=True)
def _no_own_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own looks come when a test has so much time pass, not by chance."""
    monkeypatch.setattr("vllm_pd_scheduler.health.shared.random.random", lambda: 0.0)


async def test_each_instance_is_probed_once_an_interval_and_all_know_of_it(schedulers: Schedulers) -> None:
    schedulers.join("a", "b", "c")
    for number in range(6):
        await schedulers.serve(f"d{number}")
    await schedulers.acquaint()
    for number, server in enumerate(schedulers.servers.values()):
        server.page = START + f"vllm:num_requests_running {number}\nvllm:num_requests_waiting 7\n"
    await schedulers.rounds(3)
    assert [server.probes for server in schedulers.servers.values()] == [3] * 6
    assert [server.scrapes for server in schedulers.servers.values()] == [3] * 6
    for one in schedulers.all:
        assert len(one.registry.routable(D)) == 6
        for number in range(6):
            metrics = one[f"d{number}"].metrics
            assert metrics is not None
            assert (metrics.running, metrics.waiting) == (number, 7)
            assert one[f"d{number}"].models.names == {"tiny"}


async def test_alone_it_probes_all(schedulers: Schedulers) -> None:
    (a,) = schedulers.join("a")
    server = await schedulers.serve("d0")
    await schedulers.acquaint()
    await schedulers.rounds(2)
    assert server.probes == 2
    assert a["d0"].metrics is not None


async def test_ranks_are_told_each(schedulers: Schedulers) -> None:
    schedulers.join("a", "b")
    server = await schedulers.serve("d0", ranks=2, page=TWO_ENGINES)
    server.page = TWO_ENGINES
    await schedulers.acquaint()
    server.page = TWO_ENGINES.replace('running{engine="1",model_name="tiny"} ', 'running{engine="1",x="y"} 1')
    await schedulers.rounds()
    other, owner = schedulers.other("d0"), schedulers.owner("d0")
    assert server.probes == 1
    for rank in ("d0:0", "d0:1"):
        mine, theirs = owner[rank].metrics, other[rank].metrics
        assert mine is not None
        assert theirs is not None
        assert (mine.running, mine.kv_usage) == (theirs.running, theirs.kv_usage)


async def test_means_and_differences_are_those_since_the_finding_before(schedulers: Schedulers) -> None:
    schedulers.join("a", "b")
    server = await schedulers.serve("d0")
    page = START + "vllm:num_requests_running 0\nvllm:generation_tokens_total %d\n"
    name = "vllm:request_time_per_output_token_seconds"
    latencies = []
    for count in (0, 0, 10, 20):
        server.page = page % (100 * count) + f"{name}_sum {0.04 * count}\n{name}_count {count}\n"
        await schedulers.acquaint() if not count else await schedulers.rounds()
        metrics = schedulers.other("d0")["d0"].metrics
        assert metrics is not None
        latencies.append((metrics.latency, metrics.output_tokens))
    assert latencies[2:] == [(pytest.approx(0.04), 1000.0)] * 2


class TestInFlight:
    """What the instance cannot know of when it is asked was not seen yet."""

    async def test_what_is_sent_after_it_was_asked(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0", page="vllm:num_requests_waiting 2\n")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        other.registry.work.reserve(other["d0"])
        owner.registry.work.reserve(owner["d0"])

        def sent_meanwhile() -> None:
            schedulers.exchange()  # that it is asked, and what was sent before
            for _ in range(3):
                other.registry.work.reserve(other["d0"])
            schedulers.now += 0.02
            schedulers.exchange()

        server.on_scrape = sent_meanwhile
        await schedulers.rounds()
        for one in (owner, other):
            endpoint = one["d0"]
            assert (endpoint.in_flight, endpoint.in_flight_at_scrape) == (5, 2)
            assert endpoint.waiting == 2 + 3

    async def test_a_replica_that_has_not_heard_that_it_was_asked_takes_what_is_there_now(
        self, schedulers: Schedulers
    ) -> None:
        schedulers.join("a", "b")
        await schedulers.serve("d0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        other.registry.work.reserve(other["d0"])
        owner.replica.probes.asks = lambda endpoint: None  # type: ignore[method-assign]
        await schedulers.rounds()
        assert (other["d0"].in_flight, other["d0"].in_flight_at_scrape) == (1, 1)


class TestBadNews:
    """It makes each look for itself."""

    async def test_an_instance_that_dies_is_looked_at_by_all(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b", "c")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        server.status = 503
        await schedulers.owner("d0").look()
        schedulers.exchange()
        assert all(one.looks("d0") for one in schedulers.all)
        await schedulers.rounds(2)
        for one in schedulers.all:
            assert one["d0"].probes.healthy is False
            assert reason(one["d0"]) == "/health answers 503"
        server.status = 200
        await schedulers.rounds()
        for one in schedulers.all:
            assert one["d0"].probes.healthy is True
        await schedulers.rounds()
        assert [one.looks("d0") for one in schedulers.all].count(True) == 1

    async def test_the_scraper_that_is_cut_off_from_it_takes_it_out_for_itself_alone(
        self, schedulers: Schedulers
    ) -> None:
        schedulers.join("a", "b", "c")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner = schedulers.owner("d0")
        owner.registry.resolved(owner["d0"], "127.9.9.9")
        await schedulers.rounds(4)
        assert owner["d0"].probes.healthy is False
        for one in schedulers.all:
            if one is not owner:
                assert one["d0"].probes.healthy is True
                assert one.looks("d0")
        assert server.probes >= 6

    async def test_one_that_is_cut_off_is_not_told_that_it_is_well(self, schedulers: Schedulers) -> None:
        """By its own probe, which comes at the latest after a number of intervals."""
        schedulers.join("a", "b")
        await schedulers.serve("d0")
        await schedulers.acquaint()
        other = schedulers.other("d0")
        other.registry.resolved(other["d0"], "127.9.9.9")
        await schedulers.rounds(3)
        assert other["d0"].probes.healthy is True, "it has not looked"
        await schedulers.rounds(int(OWN_LOOK_S / INTERVAL_S))
        assert other["d0"].probes.healthy is False
        await schedulers.rounds(3)
        assert other["d0"].probes.healthy is False
        other.registry.resolved(other["d0"], "127.0.0.1")
        await schedulers.rounds(2)
        assert other["d0"].probes.healthy is True
        assert not other.looks("d0")

    async def test_one_at_which_own_requests_fail_is_looked_at(self, schedulers: Schedulers) -> None:
        """Whatever others tell: only a look of its own, or a request, ends that."""
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        assert not other.looks("d0")
        other.registry.ends.failed(other["d0"], "reset", schedulers.now)
        assert other.looks("d0"), "one failure is enough"
        server.status = 503
        await other.look()
        server.status = 200
        schedulers.now += INTERVAL_S
        await owner.look()
        schedulers.exchange()
        assert other["d0"].probes.problem == "/health answers 503", "the other's word does not count"
        await other.look()
        assert not other["d0"].probes.problem
        other.registry.ends.succeeded(other["d0"])
        assert not other.looks("d0")

    async def test_a_trial_follows_a_look_of_its_own_not_a_word_of_others(
        self, schedulers: Schedulers
    ) -> None:
        schedulers.join("a", "b")
        await schedulers.serve("d0")
        await schedulers.serve("d1")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        for _ in range(3):
            other.registry.ends.failed(other["d0"], "reset", schedulers.now)
        other.deaf = True  # the ejection is its own alone
        schedulers.now += INTERVAL_S
        await owner.look()
        other.deaf = False
        schedulers.exchange()
        assert other["d0"].ejected
        await other.look()
        assert other["d0"].routable

    async def test_an_engine_that_stands_still_is_found_by_all(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b", "c")
        await schedulers.serve("d0", page="vllm:num_requests_running 3\nvllm:generation_tokens_total 9\n")
        await schedulers.acquaint()
        await schedulers.rounds(9)
        for one in schedulers.all:
            assert "its engine stands still" in reason(one["d0"])

    async def test_all_find_that_it_hangs(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("p0", role=P)
        await schedulers.acquaint()
        server.mute()
        for one in schedulers.all:
            one.monitor._silence.seconds = 0.01
        await schedulers.rounds(3)
        await until(lambda: all(one.hung == ["p0"] for one in schedulers.all))


class TestNews:
    """What is new is seen by each with its own eyes."""

    async def test_another_process(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        for one in schedulers.all:
            one.registry.work.reserve(one["d0"])
        server.page = server.page.replace("1.7e9", "1.8e9")
        await schedulers.rounds(2)
        assert (owner["d0"].generation, other["d0"].generation) == (1, 1)
        assert (owner["d0"].in_flight, other["d0"].in_flight) == (0, 0)

    async def test_other_models(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        await schedulers.rounds(3)
        assert len(server.authorization) == 1, "asked by one, and not by the other"
        server.models = ["tiny", "adapter"]
        await schedulers.rounds(4)
        for one in schedulers.all:
            assert one["d0"].models.names == {"tiny", "adapter"}
        asked = len(server.authorization)
        await schedulers.rounds(3)
        assert len(server.authorization) == asked + 1

    async def test_another_address(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0", host="vllm-0")
        await schedulers.acquaint()
        other = schedulers.other("d0")
        assert not other.looks("d0")
        for one in schedulers.all:
            one.addresses["vllm-0"] = ["127.0.0.2"]
        await schedulers.rounds(5)
        for one in schedulers.all:
            assert one["d0"].address == f"127.0.0.2:{server.port}"

    async def test_an_address_that_is_only_told_is_not_used(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0", host="vllm-0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        owner.registry.resolved(owner["d0"], "127.0.0.2")
        owner.addresses["vllm-0"] = ["127.0.0.2"]
        await schedulers.rounds(3)
        assert other["d0"].address == f"127.0.0.1:{server.port}"
        assert other.looks("d0"), "they do not agree where it is"

    async def test_a_new_instance_is_looked_at_by_all(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        await schedulers.serve("d0")
        await schedulers.acquaint()
        server = await schedulers.serve("d1")
        await schedulers.rounds()
        assert server.probes == 2
        await schedulers.rounds(2)
        assert server.probes <= 5
        assert all(one["d1"].routable for one in schedulers.all)


class TestSilence:
    """Nothing depends on what others tell."""

    async def test_a_scraper_that_tells_nothing(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        owner.replica.probes.finds = lambda *_: None  # type: ignore[method-assign]
        schedulers.now += 0.9 * HEARD_INTERVALS * INTERVAL_S
        owner.replica.publish(schedulers.now)
        assert not other.looks("d0")
        schedulers.now += 0.2 * HEARD_INTERVALS * INTERVAL_S
        assert other.looks("d0")
        await schedulers.rounds(2)
        assert server.probes == 4, "each by itself"

    async def test_a_scraper_that_dies(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner = schedulers.owner("d0")
        schedulers.all.remove(owner)
        await schedulers.rounds(3)
        assert server.probes >= 2
        assert schedulers.owner("d0") is schedulers.all[0]
        schedulers.all.append(owner)

    async def test_a_split(self, schedulers: Schedulers) -> None:
        a, b = schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        a.deaf = True
        await schedulers.rounds(2)
        server.probes = 0
        await schedulers.rounds(2)
        assert server.probes == 4
        a.deaf = False
        await schedulers.rounds(2)
        server.probes = 0
        await schedulers.rounds(2)
        assert server.probes == 2
        assert a["d0"].routable
        assert b["d0"].routable


class TestLiars:
    """What one replica tells that is not so."""

    async def lie(self, schedulers: Schedulers, told: bytes, times: int = 1) -> tuple[Scheduler, bool]:
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        number = owner.replica._number
        for _ in range(times):
            number += 1
            message = Message(owner.name, number, False, (0, 0), ["d0"], probing=[0], found=[Found(0, told)])
            used = other.replica.receive(KEY.encode(message), schedulers.now)
        return other, used

    async def prepared(self, schedulers: Schedulers) -> Server:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        return server

    async def test_that_it_is_dead(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        other, _ = await self.lie(schedulers, b"", times=50)
        assert other["d0"].routable
        assert other.looks("d0")

    async def test_that_it_runs_a_nonsense_number_of_requests(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        before = schedulers.other("d0")["d0"].metrics
        told = msgspec.msgpack.encode(
            ["", b"", [[float("nan"), 0, 0, [], 1.7e9, None, 0, 0, 0, None, [], 0]]]
        )
        other, used = await self.lie(schedulers, told)
        assert used
        assert other["d0"].metrics is before
        assert other.replica.disbelieved[Disbelieved.FINDINGS] == 1

    async def test_of_other_ranks_than_it_has(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        page = [0, 0, 0, [], 1.7e9, None, 0, 0, 0, None, [], 0]
        other, _ = await self.lie(schedulers, msgspec.msgpack.encode(["", b"", [page, page]]))
        assert other.replica.disbelieved[Disbelieved.FINDINGS] == 1

    async def test_too_often(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        page = [9, 9, 0, [], 1.7e9, None, 0, 0, 0, None, [], 0]
        other, seen = schedulers.other("d0"), []
        other.registry.on_scraped = lambda: seen.append(1)
        await self.lie(schedulers, msgspec.msgpack.encode(["", b"", [page]]), times=100)
        assert len(seen) <= 5

    async def test_that_one_is_well_which_is_not(self, schedulers: Schedulers) -> None:
        server = await self.prepared(schedulers)
        server.status = 503
        other = schedulers.other("d0")
        await other.monitor.check(other["d0"])
        page = [0, 0, 0, [], 1.7e9, None, 0, 0, 0, None, [], 0]
        for _ in range(4):
            schedulers.now += INTERVAL_S
            await self.lie(schedulers, msgspec.msgpack.encode(["", b"", [page]]))
            assert other.looks("d0")
            await other.look()
        assert other["d0"].probes.healthy is False

    async def test_that_it_was_restarted(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        other = schedulers.other("d0")
        other.registry.work.reserve(other["d0"])
        page = [0, 0, 0, [], 1.8e9, None, 0, 0, 0, None, [], 0]
        await self.lie(schedulers, msgspec.msgpack.encode(["", b"", [page]]))
        assert other["d0"].generation == 0
        assert other["d0"].in_flight == 1
        assert other.looks("d0")


class TestLoops:
    """The same with loops that run."""

    async def test_the_loops_probe_their_own(self, schedulers: Schedulers) -> None:
        loop = asyncio.get_running_loop()
        ones = schedulers.join("a", "b", interval=0.05)
        for number in range(4):
            await schedulers.serve(f"d{number}")
        begun = loop.time()

        async def pump() -> None:
            while True:
                schedulers.now = 100.0 + loop.time() - begun
                schedulers.exchange()
                await asyncio.sleep(0.002)

        pumping = asyncio.ensure_future(pump())
        await until(lambda: all(len(one.replica.others) == 1 for one in ones))
        heard = {one.name: 0 for one in ones}
        for one in ones:
            take = one.monitor.heard

            def counted(*args: object, one: Scheduler = one, take: object = take) -> None:
                heard[one.name] += 1
                take(*args)  # type: ignore[operator]

            one.monitor.heard = counted  # type: ignore[method-assign]
            await one.monitor.start()
        await until(lambda: min(heard.values()) >= 10)
        pumping.cancel()

    async def test_bad_news_ends_a_pause(
        self, schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "RECOVERY_INTERVAL_S", 0.01)
        schedulers.join("a", "b", interval=600.0)
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        schedulers.exchange()
        await other.monitor.start()
        server.status = 503
        probes = server.probes
        await owner.monitor.check(owner["d0"])
        schedulers.exchange()
        await until(lambda: server.probes >= probes + 2)
