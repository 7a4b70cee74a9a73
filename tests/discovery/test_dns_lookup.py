"""What is made of the answers of a DNS server: a real one on loopback, with faults."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import dns.asyncresolver
import pytest
import pytest_asyncio

from tests.support.dns_server import DnsServer, Fault, dns_server
from vllm_pd_scheduler.discovery.dns import lookup
from vllm_pd_scheduler.discovery.dns.lookup import Found, LookUpFailed, Question, Server, look_up
from vllm_pd_scheduler.system.daemon_thread import in_daemon_thread

NAME = "decode.llm.svc"
SRV = "_http._tcp.decode.llm.svc"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[DnsServer]:
    async with dns_server() as running:
        yield running


async def ask(server: DnsServer, name: str = NAME, port: int | None = 8000) -> Found:
    question = Question(name, port, ("127.0.0.1", server.port))
    return await in_daemon_thread(partial(look_up, question))


async def places(server: DnsServer, name: str = NAME, port: int | None = 8000) -> list[str]:
    return sorted(f"{each.host} {each.port}" for each in (await ask(server, name, port)).servers)


async def failure(server: DnsServer, name: str = NAME, port: int | None = 8000) -> str:
    with pytest.raises(LookUpFailed) as caught:
        await ask(server, name, port)
    return str(caught.value)


class TestAddresses:
    async def test_each_address_is_a_server_and_the_ttl_is_theirs(self, server: DnsServer) -> None:
        server.set(NAME, "A", "10.0.0.1", "10.0.0.2", ttl=7)
        expected = frozenset(Server(f"10.0.0.{n}", 8000, NAME) for n in (1, 2))
        assert await ask(server) == Found(expected, 7)
        assert server.asked == [("udp", f"{NAME}.", "A")]

    async def test_ipv6_counts_where_there_is_no_ipv4(self, server: DnsServer) -> None:
        server.set(NAME, "AAAA", "2001:db8::1")
        assert await places(server) == ["2001:db8::1 8000"]
        server.set(NAME, "A", "10.0.0.1")
        assert await places(server) == ["10.0.0.1 8000"]

    async def test_no_such_name_and_no_addresses_are_no_servers(self, server: DnsServer) -> None:
        assert (await ask(server)).servers == frozenset()
        server.set(NAME, "TXT", "x")
        server.negative_ttl = 3
        assert await ask(server) == Found(frozenset(), 3)

    async def test_an_alias_of_an_alias(self, server: DnsServer) -> None:
        server.set(NAME, "CNAME", "b.llm.svc.", ttl=9)
        server.set("b.llm.svc", "CNAME", "c.llm.svc.", ttl=4)
        server.set("c.llm.svc", "A", "10.0.0.1", ttl=60)
        found = await ask(server)
        assert found == Found(frozenset({Server("10.0.0.1", 8000, NAME)}), 4)

    async def test_an_alias_whose_end_is_not_in_the_answer_is_followed(self, server: DnsServer) -> None:
        server.set(NAME, "CNAME", "elsewhere.llm.svc.")
        server.set("elsewhere.llm.svc", "A", "10.0.0.1")
        assert await places(server) == ["10.0.0.1 8000"]

    async def test_an_alias_of_nothing_is_no_server(self, server: DnsServer) -> None:
        server.set(NAME, "CNAME", "gone.llm.svc.")
        assert await places(server) == []

    async def test_aliases_in_a_circle_are_no_answer(self, server: DnsServer) -> None:
        server.set(NAME, "CNAME", "b.llm.svc.")
        server.set("b.llm.svc", "CNAME", f"{NAME}.")
        assert NAME in await failure(server)

    async def test_many_records_come_by_tcp(self, server: DnsServer) -> None:
        server.set(NAME, "A", *(f"10.0.{n // 256}.{n % 256}" for n in range(3000)))
        assert len((await ask(server)).servers) == 3000
        assert [transport for transport, _, _ in server.asked] == ["udp", "tcp"]

    async def test_seventy_records_fit_in_one_datagram(self, server: DnsServer) -> None:
        server.set(NAME, "A", *(f"10.0.0.{n}" for n in range(70)))
        assert len((await ask(server)).servers) == 70
        assert [transport for transport, _, _ in server.asked] == ["udp"]

    async def test_an_answer_that_is_cut_by_tcp_too_is_none(self, server: DnsServer) -> None:
        server.set(NAME, "A", *(f"10.0.{n // 256}.{n % 256}" for n in range(3000)))
        server.cut_by_tcp = True
        assert await failure(server) == f"{NAME} A: more records than one answer can have"


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            ("servfail", "SERVFAIL"),
            ("refused", "REFUSED"),
            ("silent", "no answer"),
            ("garbage", "no answer"),
            ("cut", "no answer"),
            ("other", "no answer"),
        ],
    )
    async def test_a_server_that_says_nothing_of_use(
        self, server: DnsServer, fault: Fault, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lookup, "QUERY_S", 0.5)
        server.set(NAME, "A", "10.0.0.1")
        server.fault = fault
        assert await failure(server) == f"{NAME} A: 127.0.0.1:{server.port}: {said}"

    async def test_nobody_listens(self, server: DnsServer) -> None:
        question = Question(NAME, 8000, ("127.0.0.1", 1))
        with pytest.raises(LookUpFailed, match=r"127\.0\.0\.1:1: "):
            await in_daemon_thread(partial(look_up, question))

    async def test_ipv6_is_not_asked_for_where_ipv4_is_there(self, server: DnsServer) -> None:
        server.set(NAME, "A", "10.0.0.1")
        server.faults["AAAA"] = "silent"
        assert await places(server) == ["10.0.0.1 8000"]

    async def test_ipv6_does_not_stand_in_for_ipv4_that_cannot_be_asked(self, server: DnsServer) -> None:
        server.set(NAME, "A", "10.0.0.1")
        server.set(NAME, "AAAA", "2001:db8::1")
        server.faults["A"] = "servfail"
        assert "A: 127.0.0.1" in await failure(server)

    async def test_a_name_that_cannot_be_asked_for(self, server: DnsServer) -> None:
        assert "empty" in await failure(server, "a..b")


class TestServices:
    @staticmethod
    def three(server: DnsServer) -> None:
        records = [f"0 100 {8000 + n} pod-{n}.{NAME}." for n in range(3)]
        server.set(SRV, "SRV", *records, ttl=30)

    async def test_ports_and_addresses_are_in_one_answer(self, server: DnsServer) -> None:
        self.three(server)
        for n in range(3):
            server.along(f"pod-{n}.{NAME}.", "A", f"10.0.0.{n}", ttl=5)
        found = await ask(server, SRV, None)
        expected = {Server(f"10.0.0.{n}", 8000 + n, f"pod-{n}.{NAME}") for n in range(3)}
        assert found == Found(frozenset(expected), 5)
        assert len(server.asked) == 1

    async def test_targets_whose_addresses_are_not_sent_along_are_asked_for(self, server: DnsServer) -> None:
        self.three(server)
        server.along(f"pod-0.{NAME}.", "A", "10.0.0.0")
        server.set(f"pod-1.{NAME}", "A", "10.0.0.1")
        server.set(f"pod-2.{NAME}", "AAAA", "2001:db8::2")
        assert await places(server, SRV, None) == ["10.0.0.0 8000", "10.0.0.1 8001", "2001:db8::2 8002"]

    async def test_a_target_that_has_gone_leaves_the_others(self, server: DnsServer) -> None:
        self.three(server)
        server.set(f"pod-1.{NAME}", "A", "10.0.0.1")
        assert await places(server, SRV, None) == ["10.0.0.1 8001"]

    async def test_a_target_that_cannot_be_asked_for_is_no_answer(self, server: DnsServer) -> None:
        self.three(server)
        server.faults["A"] = "servfail"
        assert "pod-" in await failure(server, SRV, None)

    async def test_many_targets(self, server: DnsServer) -> None:
        server.set(SRV, "SRV", *(f"0 0 8000 p{n}.{NAME}." for n in range(200)))
        for n in range(200):
            server.set(f"p{n}.{NAME}", "A", f"10.1.{n // 256}.{n % 256}")
        assert len((await ask(server, SRV, None)).servers) == 200

    async def test_the_root_as_target_says_that_there_is_none(self, server: DnsServer) -> None:
        server.set(SRV, "SRV", "0 0 0 .")
        assert await places(server, SRV, None) == []

    async def test_no_such_service(self, server: DnsServer) -> None:
        assert await places(server, SRV, None) == []


class TestSystem:
    """The resolver of the system, which ``/etc/resolv.conf`` describes."""

    @pytest.fixture
    def resolv_conf(self, server: DnsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
        path = tmp_path / "resolv.conf"
        path.write_text(
            "nameserver 127.0.0.1\nsearch llm.svc.cluster.local svc.cluster.local\noptions ndots:5\n"
        )
        real = dns.asyncresolver.Resolver

        def system(configure: bool) -> dns.asyncresolver.Resolver:
            found = real(str(path), configure)
            found.port = server.port
            return found

        monkeypatch.setattr(dns.asyncresolver, "Resolver", system)
        return path

    @pytest.mark.usefixtures("resolv_conf")
    async def test_search_domains_are_tried(self, server: DnsServer) -> None:
        server.set("decode.llm.svc.cluster.local", "A", "10.0.0.1")
        for name in ("decode", "decode.llm", "decode.llm.svc.cluster.local", "decode.llm.svc.cluster.local."):
            found = await in_daemon_thread(partial(look_up, Question(name, 8000)))
            assert {each.host for each in found.servers} == {"10.0.0.1"}, name

    @pytest.mark.usefixtures("resolv_conf")
    async def test_no_name_of_the_search_is_no_servers(self, server: DnsServer) -> None:
        found = await in_daemon_thread(partial(look_up, Question("decode", 8000)))
        assert found.servers == frozenset()
        assert len(server.asked) == 3

    async def test_a_system_without_resolver(self, resolv_conf: Any) -> None:
        resolv_conf.write_text("")
        with pytest.raises(LookUpFailed, match=r"decode: /etc/resolv.conf: no nameservers"):
            await in_daemon_thread(partial(look_up, Question("decode", 8000)))


async def test_look_ups_at_once_are_apart(server: DnsServer) -> None:
    server.set(NAME, "A", "10.0.0.1")
    found = await asyncio.gather(*(places(server) for _ in range(5)))
    assert found == [["10.0.0.1 8000"]] * 5
