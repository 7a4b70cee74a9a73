"""Several schedulers that watch one fleet: each instance is probed by one, which tells what it finds."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.waiting import until
from vllm_pd_scheduler.health import monitor as health
from vllm_pd_scheduler.health.shared import HEARD_INTERVALS
from vllm_pd_scheduler.models import InstanceRole

from .schedulers import INTERVAL_S, START, Scheduler, Schedulers
from .test_vllm_metrics import TWO_ENGINES

D = InstanceRole.DECODE


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
