"""Probes and scrapes of real HTTP servers on unused ports."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.support.processes import unused_ports
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.health import monitor as health
from vllm_pd_scheduler.models import InstanceRole, InstanceState, MetricsSnapshot

from .instances import Fixture

HEALTHY, UNHEALTHY = InstanceState.HEALTHY, InstanceState.UNHEALTHY


class TestCheck:
    async def test_a_healthy_instance(self, fleet: Fixture) -> None:
        await fleet.serve()
        await fleet.monitor().check(fleet["d0"])
        assert fleet["d0"].state is HEALTHY
        assert reason(fleet["d0"]) == ""
        assert fleet["d0"].metrics == MetricsSnapshot(10.0, running=3.0, waiting=2.0, kv_usage=0.5)
        assert fleet.failed_scrapes("d0") == 0

    async def test_the_first_probe_decides_and_later_ones_need_the_thresholds(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        monitor = fleet.monitor()
        seen = []
        for status in (503, 200, 500, 200, 404, 503, 503, 200):
            server.status = status
            await monitor.check(fleet["d0"])
            seen.append("H" if fleet["d0"].state is HEALTHY else "u")
        assert "".join(seen) == "uHHHHuuH"

    @pytest.mark.parametrize("status", [204, 301, 401, 404, 500, 503])
    async def test_only_200_is_health(self, fleet: Fixture, status: int) -> None:
        server = await fleet.serve()
        server.status = status
        await fleet.monitor().check(fleet["d0"])
        assert fleet["d0"].state is UNHEALTHY
        assert reason(fleet["d0"]) == f"/health answers {status}"

    async def test_nobody_listens(self, fleet: Fixture) -> None:
        fleet.add("d0", "127.0.0.1", unused_ports(1)[0])
        await fleet.monitor().check(fleet["d0"])
        assert fleet["d0"].state is UNHEALTHY
        assert reason(fleet["d0"]).startswith("/health cannot be reached: ")
        assert fleet["d0"].metrics is None
        assert fleet.failed_scrapes("d0") == 1

    async def test_no_answer_in_time(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        server.go.clear()
        async with asyncio.timeout(HUNG_S):
            await fleet.monitor(timeout=1.0).check(fleet["d0"])
        assert fleet["d0"].state is UNHEALTHY
        assert reason(fleet["d0"]) == "/health did not answer within 1 s"
        assert fleet["d0"].metrics is not None, "the page was there"

    async def test_something_that_speaks_no_http(self, fleet: Fixture) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b"220 mail.example.com ESMTP\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        fleet.add("d0", "127.0.0.1", server.sockets[0].getsockname()[1])
        await fleet.monitor().check(fleet["d0"])
        server.close()
        assert fleet["d0"].state is UNHEALTHY
        assert reason(fleet["d0"]).startswith("/health cannot be reached: ")

    async def test_a_scrape_that_fails_keeps_what_was_known(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        monitor = fleet.monitor()
        await monitor.check(fleet["d0"])
        known = fleet["d0"].metrics
        broken = [(500, ""), (200, "<html>"), (200, "vllm:num_requests_running x"), (404, "")]
        for failures, (status, page) in enumerate(broken, 1):
            server.page_status, server.page = status, page
            fleet.now += 1
            await monitor.check(fleet["d0"])
            assert fleet["d0"].metrics is known
            assert fleet["d0"].state is HEALTHY, "metrics say nothing about health"
            assert fleet.failed_scrapes("d0") == failures

    async def test_two_scrapes_give_a_latency(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        monitor = fleet.monitor()
        page = "vllm:num_requests_running 0\n"
        name = "vllm:request_time_per_output_token_seconds"
        latencies = []
        for total, count in ((1.0, 10), (1.4, 20), (1.4, 20), (0.1, 1)):
            server.page = page + f"{name}_sum {total}\n{name}_count {count}\n"
            await monitor.check(fleet["d0"])
            latencies.append(fleet["d0"].latency)
        assert latencies == [None, pytest.approx(0.04), pytest.approx(0.04), None]

    async def test_what_is_sent_while_the_page_is_read_counts_as_not_yet_seen(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        endpoint = fleet["d0"]
        fleet.registry.work.reserve(endpoint)
        server.on_scrape = lambda: [fleet.registry.work.reserve(endpoint) for _ in range(4)] and None
        await fleet.monitor().check(endpoint)
        assert (endpoint.in_flight, endpoint.in_flight_at_scrape) == (5, 1)
        assert endpoint.waiting == 2 + 4

    async def test_an_instance_removed_while_probed(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        server.go.clear()
        endpoint = fleet["d0"]
        check = asyncio.ensure_future(fleet.monitor().check(endpoint))
        await until(lambda: server.held == 1)
        fleet.registry.remove("d0")
        again = fleet.add("d0", "127.0.0.1", server.port)
        server.go.set()
        await check
        assert endpoint.probes.healthy is None
        assert again.probes.healthy is None, "the one that came in its place has not been probed"
        assert endpoint.metrics is None


class TestLoops:
    async def test_start_probes_all_before_it_returns(self, fleet: Fixture) -> None:
        for name in ("d0", "d1"):
            await fleet.serve(name)
        fleet.add("d2", "127.0.0.1", unused_ports(1)[0])
        await fleet.monitor(interval=60).start()
        assert [fleet[name].state for name in ("d0", "d1", "d2")] == [HEALTHY, HEALTHY, UNHEALTHY]

    async def test_what_the_start_finds_is_one_change(self, fleet: Fixture) -> None:
        """Whoever listens looks at all instances: with 1,000 changes of 1,000 the start would take long."""
        for name in ("d0", "d1", "d2"):
            await fleet.serve(name)
        changes = []
        fleet.registry.changes.subscribe(
            lambda: changes.append(len(fleet.registry.routable(InstanceRole.DECODE)))
        )
        await fleet.monitor(interval=60).start()
        assert changes == [3]

    async def test_a_slow_instance_delays_no_other(self, fleet: Fixture) -> None:
        slow, fast = await fleet.serve("slow"), await fleet.serve("fast")
        await fleet.monitor().start()
        slow.go.clear()
        await until(lambda: slow.held == 1)
        probes, scrapes, stuck = fast.probes, fast.scrapes, slow.probes
        await until(lambda: fast.probes >= probes + 10 and fast.scrapes >= scrapes + 10)
        assert (slow.held, slow.probes) == (1, stuck), "the slow one is still at the same probe"
        assert fleet["fast"].state is HEALTHY

    async def test_one_that_hangs_leaves_and_comes_back(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        await fleet.monitor(timeout=0.3).start()
        await until(lambda: fleet["d0"].state is HEALTHY)
        server.go.clear()
        await until(lambda: fleet["d0"].state is UNHEALTHY)
        server.go.set()
        await until(lambda: fleet["d0"].state is HEALTHY)

    async def test_one_that_is_down_is_probed_more_often_than_the_interval(
        self, fleet: Fixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "RECOVERY_INTERVAL_S", 0.01)
        down, up = await fleet.serve("down"), await fleet.serve("up")
        down.status = 503
        await fleet.monitor(interval=60).start()
        await until(lambda: down.probes >= 4)
        down.status = 200
        await until(lambda: fleet["down"].state is HEALTHY)
        assert up.probes == 1

    async def test_those_that_come_and_go(self, fleet: Fixture) -> None:
        first = await fleet.serve("first")
        await fleet.monitor().start()
        second = await fleet.serve("second")
        await until(lambda: fleet["second"].state is HEALTHY)
        fleet.registry.remove("first")
        await asyncio.sleep(0)
        gone, probes = first.probes, second.probes
        await until(lambda: second.probes >= probes + 5)
        assert first.probes <= gone + 1, "the one under way at most"

    async def test_a_draining_one_is_still_watched(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        await fleet.monitor().start()
        fleet.registry.drain("d0")
        probes = server.probes
        await until(lambda: server.probes >= probes + 3)

    async def test_a_failure_of_ours_does_not_end_the_loop(
        self, fleet: Fixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monitor = fleet.monitor()
        await monitor.start()
        check: Callable[[Endpoint], Awaitable[None]] = monitor.check
        calls = []

        async def fails_at_first(endpoint: Endpoint) -> None:
            calls.append(endpoint)
            if len(calls) <= 2:
                raise RuntimeError("boom")
            await check(endpoint)

        monkeypatch.setattr(monitor, "check", fails_at_first)
        await fleet.serve()
        await until(lambda: fleet["d0"].state is HEALTHY)
        assert [record.message for record in caplog.records if record.exc_info] == [
            "health check of d0 failed"
        ] * 2

    async def test_after_stop_nothing_is_probed(self, fleet: Fixture) -> None:
        server = await fleet.serve("d0")
        monitor = fleet.monitor()
        await monitor.start()
        await until(lambda: server.probes >= 2)
        await monitor.stop()
        late = await fleet.serve("late")
        probes = server.probes
        await asyncio.sleep(0.05)
        assert (server.probes, late.probes) == (probes, 0)
