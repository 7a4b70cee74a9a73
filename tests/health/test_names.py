"""DNS names: what a resolver that fails, lies, dawdles or hangs does to an instance, which is nothing."""

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.waiting import until
from vllm_pd_scheduler.admin.collectors import collectors
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.health import names
from vllm_pd_scheduler.health.names import NameNotResolved, NameResolver
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance
from vllm_pd_scheduler.router import PDRouter

from .instances import Fixture

HEALTHY, UNHEALTHY = InstanceState.HEALTHY, InstanceState.UNHEALTHY
D = InstanceRole.DECODE


class Dns:
    """A resolver that answers as it is told: addresses, or an error, for all names or for one."""

    def __init__(self) -> None:
        self.answers: list[str] | Exception = ["127.0.0.1"]
        self.of: dict[str, list[str] | Exception] = {}
        self.asked: list[str] = []
        self.under_way = 0
        self._go = threading.Event()
        self._go.set()

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        self.under_way += 1
        self._go.wait(30)
        self.under_way -= 1
        answers = self.of.get(host, self.answers)
        if isinstance(answers, Exception):
            raise answers
        return answers

    def hang(self) -> None:
        self._go.clear()

    def go(self) -> None:
        self._go.set()


OUTAGE = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
NOBODY = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.fixture
def dns() -> Iterator[Dns]:
    made = Dns()
    yield made
    made.go()


async def test_the_system_resolver(fleet: Fixture) -> None:
    server = await fleet.serve(host="localhost")
    monitor = fleet.monitor()
    assert fleet["d0"].address is None
    await monitor.check(fleet["d0"])
    assert fleet["d0"].address == f"127.0.0.1:{server.port}"
    assert fleet.registry.routable(D) == (fleet["d0"],)
    assert fleet["d0"].metrics is not None


class TestOutage:
    """Names were resolved, and then the resolver fails in one way or another."""

    @pytest.mark.parametrize("outage", [OUTAGE, NOBODY, OSError("out of files"), [], ["fe80::1%eth0"]])
    async def test_the_last_address_stays_in_use(
        self, fleet: Fixture, dns: Dns, outage: Exception | list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "vllm_pd_scheduler")
        server = await fleet.serve(host="vllm-0")
        monitor = fleet.monitor(names=NameResolver(dns))
        await monitor.check(fleet["d0"])
        dns.answers = outage
        for _ in range(5):
            await monitor.check(fleet["d0"])
            await until(lambda: not dns.under_way)
        assert fleet["d0"].state is HEALTHY
        assert fleet["d0"].address == f"127.0.0.1:{server.port}"
        assert server.probes == 6, "it is probed all the same"
        said = [record.message for record in caplog.records if "cannot be resolved" in record.message]
        assert len(said) == 1, "once, however long it lasts"
        assert said[0].startswith("d0: the name vllm-0 cannot be resolved: ")
        assert said[0].endswith(f"; its last address 127.0.0.1:{server.port} stays in use")

    async def test_it_says_how_old_the_address_is(self, fleet: Fixture, dns: Dns) -> None:
        await fleet.serve(host="vllm-0")
        monitor = fleet.monitor(names=NameResolver(dns))
        assert fleet["d0"].resolved_at is None
        for answer, at in ((["127.0.0.1"], 10.0), (OUTAGE, 20.0), (["127.0.0.1"], 30.0)):
            dns.answers, fleet.now = answer, at
            asked = len(dns.asked)
            await monitor.check(fleet["d0"])
            await until(lambda asked=asked: len(dns.asked) > asked and not dns.under_way)  # type: ignore[misc]
            await until(lambda: monitor._watched[fleet["d0"]].look_up.done())  # type: ignore[union-attr]
            assert fleet["d0"].resolved_at == (30.0 if at == 30.0 else 10.0)

    async def test_an_instance_that_is_down_is_still_found_out(self, fleet: Fixture, dns: Dns) -> None:
        server = await fleet.serve(host="vllm-0")
        monitor = fleet.monitor(names=NameResolver(dns))
        await monitor.check(fleet["d0"])
        dns.answers, server.status = OUTAGE, 503
        for _ in range(2):
            await monitor.check(fleet["d0"])
        assert fleet["d0"].state is UNHEALTHY
        assert reason(fleet["d0"]) == "/health answers 503"

    async def test_a_resolver_that_hangs_fails_no_probe_and_holds_one_thread_a_name(
        self, fleet: Fixture, dns: Dns
    ) -> None:
        for number in range(3):
            await fleet.serve(f"d{number}", host=f"vllm-{number}")
        monitor = fleet.monitor(names=NameResolver(dns))
        await monitor.start()
        asked = len(dns.asked)
        dns.hang()
        await until(lambda: dns.under_way == 3)
        before = [server.probes for server in fleet.servers]
        await until(lambda: all(s.probes > was + 5 for s, was in zip(fleet.servers, before, strict=True)))
        assert dns.under_way == 3
        assert len(dns.asked) <= asked + 6
        assert all(endpoint.state is HEALTHY for endpoint in fleet.registry)

    async def test_no_more_threads_than_a_few_hang_and_all_names_get_their_turn(
        self, fleet: Fixture, dns: Dns
    ) -> None:
        resolver = NameResolver(dns)
        dns.hang()
        hosts = [f"vllm-{number}" for number in range(3 * names.THREADS)]
        waiting = [asyncio.ensure_future(resolver.addresses(host)) for host in hosts for _ in range(2)]
        await until(lambda: dns.under_way == names.THREADS)
        assert sum(thread.name == "pd-resolver" for thread in threading.enumerate()) == names.THREADS
        dns.go()
        assert await asyncio.gather(*waiting) == [["127.0.0.1"]] * len(waiting)
        assert sorted(dns.asked) == sorted(hosts), "each once"

    async def test_without_a_thread_left_a_name_is_not_resolved(
        self, dns: Dns, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def start(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        resolver = NameResolver(dns)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(NameNotResolved, match="can't start new thread"):
                await resolver.addresses("vllm-0")
        assert await resolver.addresses("vllm-0") == ["127.0.0.1"]


class TestFirstLookUp:
    async def test_a_name_that_nobody_knows(self, fleet: Fixture, dns: Dns) -> None:
        endpoint, dns.answers = fleet.add("d0", "vllm-0", 80), NOBODY
        await fleet.monitor(names=NameResolver(dns)).check(endpoint)
        assert endpoint.state is UNHEALTHY
        assert endpoint.address is None
        assert reason(endpoint) == "the name vllm-0 cannot be resolved: Name or service not known"

    async def test_one_that_takes_its_time(self, fleet: Fixture, dns: Dns) -> None:
        """The look-up has a time of its own: what is left of it is not the probe's."""
        await fleet.serve(host="vllm-0")
        monitor = fleet.monitor(timeout=0.2, names=NameResolver(dns))
        dns.hang()
        await monitor.check(fleet["d0"])
        assert reason(fleet["d0"]) == "the name vllm-0 cannot be resolved: no answer within 0.2 s"
        dns.go()
        await until(lambda: fleet["d0"].address is not None)
        await monitor.check(fleet["d0"])
        assert fleet["d0"].state is HEALTHY

    @pytest.mark.parametrize("host", ["a..b", "x" * 64, "fe80::1%eth0", "224.0.0.1", "0.0.0.0", "::10.0.0.1"])
    async def test_a_host_that_is_none(self, fleet: Fixture, host: str) -> None:
        """The configuration refuses these; the library's PDInstance takes any."""
        endpoint = fleet.add("d0", host, 80)
        await fleet.monitor().check(endpoint)
        assert endpoint.state is UNHEALTHY
        assert reason(endpoint).startswith(f"the name {host} cannot be resolved: ")


class TestAddresses:
    @pytest.mark.parametrize(
        ("found", "usable"),
        [
            (["10.0.0.2", "10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"]),
            (["::ffff:10.0.0.1", "10.0.0.1"], ["10.0.0.1"]),
            (["2001:DB8:0:0:0:0:0:1"], ["2001:db8::1"]),
            (["fe80::1%eth0", "0.0.0.0", "224.0.0.1", "junk", "", "fd00::1"], ["fd00::1"]),
        ],
    )
    async def test_they_are_canonical(self, dns: Dns, found: list[str], usable: list[str]) -> None:
        dns.answers = found
        assert await NameResolver(dns).addresses("vllm-0") == usable

    @pytest.mark.parametrize(
        ("first", "others", "elsewhere"),
        [("10.9.0.5", "10.9.0.1", "10.9.0.7"), ("fd00::5", "fd00::1", "fd00::7")],
    )
    async def test_the_one_in_use_stays_as_long_as_the_name_has_it(
        self, fleet: Fixture, dns: Dns, first: str, others: str, elsewhere: str
    ) -> None:
        endpoint = fleet.add("d0", "vllm-0", 80)
        monitor = fleet.monitor(timeout=0.01, names=NameResolver(dns))
        brackets = "[{}]:80" if ":" in first else "{}:80"
        for found, expected in (([first], first), ([others, first], first), ([elsewhere], elsewhere)):
            dns.answers, asked = found, len(dns.asked)
            await monitor.check(endpoint)
            await until(lambda asked=asked: len(dns.asked) > asked)  # type: ignore[misc]
            await until(lambda expected=expected: endpoint.address == brackets.format(expected))  # type: ignore[misc]

    async def test_two_names_of_one_server(
        self, fleet: Fixture, dns: Dns, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Both serve; what is told of the address is told of the first, until that is removed."""
        caplog.set_level(logging.INFO, "vllm_pd_scheduler")
        server = await fleet.serve("d0", host="vllm-0")
        fleet.add("d1", "vllm-0.pool.svc", server.port)
        monitor = fleet.monitor(names=NameResolver(dns))
        d0, d1 = fleet["d0"], fleet["d1"]
        for _ in range(3):
            for endpoint in (d0, d1):
                await monitor.check(endpoint)
        assert fleet.registry.routable(D) == (d0, d1)
        assert fleet.registry.at(D, f"127.0.0.1:{server.port}") is d0
        lines = [record.message for record in caplog.records if "they are one server" in record.message]
        same = f"d1: its address 127.0.0.1:{server.port} is that of d0: they are one server"
        assert lines == [f"{same}, and what fails counts for both"]
        fleet.registry.remove("d0")
        await monitor.check(d1)
        assert fleet.registry.at(D, f"127.0.0.1:{server.port}") is d1
        assert caplog.records[-1].message == "d1: address: all is well again"


def test_the_age_is_a_metric() -> None:
    router = PDRouter(SchedulerConfig())
    registry = router.registry
    for name, host in (("p0", "vllm-0"), ("p1", "10.0.0.2"), ("p2", "never-resolved")):
        registry.add(PDInstance(name, InstanceRole.PREFILL, host, 80))
    registry.resolved(registry.get("p0"), "10.0.0.1", now=40.0)
    found = collectors(router, clock=lambda: 100.0)
    ages = [
        found.get_sample_value("pd_scheduler_address_age_seconds", {"instance": name, "role": "prefill"})
        for name in ("p0", "p1", "p2")
    ]
    assert ages == [60.0, None, None]
