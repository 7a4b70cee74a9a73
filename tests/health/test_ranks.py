"""The probes of an instance with data-parallel ranks: one for all of them, and the load of each."""

from tests.support.waiting import until
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.models import InstanceState

from .instances import Fixture, Server
from .test_vllm_metrics import TWO_ENGINES

HEALTHY, UNHEALTHY = InstanceState.HEALTHY, InstanceState.UNHEALTHY


async def served(fleet: Fixture, page: str = TWO_ENGINES, ranks: int = 2) -> Server:
    server = await fleet.serve(None)
    server.page = page
    fleet.add("d0", "127.0.0.1", server.port, ranks=ranks)
    return server


async def test_one_probe_and_one_scrape_for_all(fleet: Fixture) -> None:
    server = await served(fleet)
    held = fleet.registry.work.reserve(fleet["d0:1"])
    await fleet.monitor().check_all()
    assert (server.probes, server.scrapes, len(server.authorization)) == (1, 1, 1)
    zero, one = fleet["d0:0"], fleet["d0:1"]
    assert (zero.state, one.state) == (HEALTHY, HEALTHY)
    assert zero.metrics is not None
    assert one.metrics is not None
    assert (zero.metrics.running, one.metrics.running) == (1.0, 4.0)
    assert (zero.kv_usage, one.kv_usage) == (0.25, 0.75)
    assert (zero.in_flight_at_scrape, one.in_flight_at_scrape) == (0, 1)
    assert zero.models.names == one.models.names == {"tiny"}
    held.release()


async def test_means_are_a_rank_s_own(fleet: Fixture) -> None:
    line = 'vllm:request_time_per_output_token_seconds_%s{engine="%s"} %s\n'
    server = await served(fleet)
    monitor = fleet.monitor()
    for total in (0, 1):
        more = "".join(
            line % ("count", rank, 10 * total) + line % ("sum", rank, total * seconds)
            for rank, seconds in ((0, 1.0), (1, 3.0))
        )
        server.page = TWO_ENGINES + more
        await monitor.check_all()
    assert (fleet["d0:0"].latency, fleet["d0:1"].latency) == (0.1, 0.3)


async def test_a_loop_for_each_process(fleet: Fixture) -> None:
    server = await served(fleet)
    monitor = fleet.monitor()
    await monitor.start()
    await until(lambda: server.scrapes >= 5)
    assert abs(server.scrapes - server.probes) <= 1
    fleet.registry.remove("d0")
    await monitor.stop()


async def test_another_number_of_engines_is_no_healthy_instance(fleet: Fixture) -> None:
    """A request for a rank that is not there would be the client's 400."""
    server = await served(fleet, ranks=3)
    monitor = fleet.monitor()
    await monitor.check_all()
    assert {fleet[f"d0:{rank}"].state for rank in range(3)} == {UNHEALTHY}
    assert "engine 0, 1, and the data_parallel_size of the instance is 3" in reason(fleet["d0"])
    server.page = TWO_ENGINES + TWO_ENGINES.replace('engine="0"', 'engine="2"').replace("1.0\n", "0.0\n")
    await monitor.check_all()
    assert {fleet[f"d0:{rank}"].state for rank in range(3)} == {HEALTHY}


async def test_a_page_that_cannot_be_read_says_nothing_of_health(fleet: Fixture) -> None:
    server = await served(fleet)
    monitor = fleet.monitor()
    await monitor.check_all()
    server.page_status = 500
    await monitor.check_all()
    assert fleet["d0"].state is HEALTHY
    assert [fleet.failed_scrapes(f"d0:{rank}") for rank in range(2)] == [1, 1]
    fleet.now += 1000.0
    await monitor.check_all()
    assert [fleet[f"d0:{rank}"].metrics for rank in range(2)] == [None, None]


async def test_one_engine_that_stands_still_takes_its_process_out(fleet: Fixture) -> None:
    server = await served(fleet)
    monitor = fleet.monitor()
    generated = 'vllm:generation_tokens_total{engine="0",model_name="tiny"} '
    for tokens in range(4):
        server.page = TWO_ENGINES.replace(f"{generated}3.0", f"{generated}{tokens}.0")  # rank 0 goes on
        await monitor.check_all()
        fleet.now += 20.0
    assert fleet["d0:0"].state is fleet["d0:1"].state is UNHEALTHY
    assert "its engine stands still" in reason(fleet["d0"])


async def test_a_restart_is_seen_once(fleet: Fixture) -> None:
    server = await served(fleet)
    monitor = fleet.monitor()
    await monitor.check_all()
    server.page = TWO_ENGINES.replace("1.79588212089e+09", "1.8e+09")
    await monitor.check_all()
    assert [fleet[f"d0:{rank}"].generation for rank in range(2)] == [1, 1]
