"""A DNS name as a source: what its answers make of the fleet, over time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from tests.support.dns_server import DnsServer, dns_server
from tests.support.followed import Followed
from tests.support.waiting import until
from vllm_pd_scheduler.config import ConfigError, parse_config
from vllm_pd_scheduler.config.sources import resolver_address
from vllm_pd_scheduler.discovery.dns import lookup, source
from vllm_pd_scheduler.discovery.sources import Sources

NAME = "decode.llm.svc"
K = {"type": "kubernetes", "namespace": "llm", "selector": "app=vllm", "ports": [8000]}
D = {"type": "dns", "role": "decode", "name": NAME, "port": 8000}
P = {"type": "dns", "role": "prefill", "srv": "_http._tcp.prefill.llm.svc"}


Follow = Callable[..., Any]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[DnsServer]:
    async with dns_server() as running:
        yield running


@pytest_asyncio.fixture
async def follow(server: DnsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Follow]:
    for name, seconds in {
        "SOONEST_S": 0.02,
        "LATEST_S": 0.05,
        "AGAIN_S": 0.02,
        "EMPTY_AGAIN_S": 0.05,
    }.items():
        monkeypatch.setattr(source, name, seconds)
    started: list[Sources] = []

    async def start(*entries: dict[str, Any], **more: Any) -> Followed:
        at = {"resolver": f"127.0.0.1:{server.port}"}
        followed = Followed(*({**at, **each} for each in entries), **more)
        started.append(followed.sources)
        return await followed.start()

    yield start
    for sources in started:
        await sources.stop()


async def test_addresses_come_and_go(server: DnsServer, follow: Follow) -> None:
    server.set(NAME, "A", "10.0.0.1", "10.0.0.2")
    running = await follow(D)
    await running.until("decode-10.0.0.1-8000", "decode-10.0.0.2-8000")
    instance = running["decode-10.0.0.1-8000"]
    assert (instance.role, instance.host, instance.port) == ("decode", "10.0.0.1", 8000)
    server.set(NAME, "A", "10.0.0.2", "10.0.0.3")
    await running.until("decode-10.0.0.2-8000", "decode-10.0.0.3-8000")
    assert not any("well again" in text for text in running.events)


async def test_services_have_their_ports(server: DnsServer, follow: Follow) -> None:
    server.set(P["srv"], "SRV", "0 0 8001 a.llm.svc.", "0 0 8002 a.llm.svc.", "0 0 8001 b.llm.svc.")
    server.set("a.llm.svc", "A", "10.0.0.1")
    server.set("b.llm.svc", "AAAA", "2001:db8::b")
    running = await follow(P)
    await running.until("prefill-10.0.0.1-8001", "prefill-10.0.0.1-8002", "prefill-2001-db8--b-8001")


async def test_both_roles(server: DnsServer, follow: Follow) -> None:
    server.set(NAME, "A", "10.0.0.1")
    server.set(P["srv"], "SRV", "0 0 8001 a.llm.svc.")
    server.set("a.llm.svc", "A", "10.0.0.2")
    running = await follow(D, P)
    await running.until("decode-10.0.0.1-8000", "prefill-10.0.0.2-8001")
    assert running.router.membership.sources("decode-10.0.0.1-8000") == (f"dns:{NAME}:8000",)
    assert running.router.membership.sources("prefill-10.0.0.2-8001") == (f"dns:{P['srv']}",)


@pytest.mark.parametrize("fault", ["servfail", "silent"])
async def test_what_was_known_stays_while_dns_is_away(
    server: DnsServer, follow: Follow, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.set(NAME, "A", "10.0.0.1")
    running = await follow(D)
    await running.until("decode-10.0.0.1-8000")
    monkeypatch.setattr(lookup, "QUERY_S", 0.3)
    server.fault = fault
    await running.until_event("the instances that were known stay")
    asked = len(server.asked)
    await until(lambda: len(server.asked) > asked + 2 and running.age() > 0.5)
    assert running.ids == {"decode-10.0.0.1-8000"}
    await running.until_event("the instances that were known stay")  # said once
    monkeypatch.setattr(lookup, "QUERY_S", 5.0)
    server.fault = None
    server.set(NAME, "A", "10.0.0.1", "10.0.0.2")
    await running.until("decode-10.0.0.1-8000", "decode-10.0.0.2-8000")
    await running.until_event("all is well again")


@pytest.mark.parametrize("how", ["nxdomain", "nodata"])
async def test_a_service_that_is_scaled_to_zero_drains(server: DnsServer, follow: Follow, how: str) -> None:
    server.set(NAME, "A", "10.0.0.1")
    server.set(NAME, "TXT", "x")
    running = await follow(D)
    await running.until("decode-10.0.0.1-8000")
    if how == "nxdomain":
        server.forget(NAME)
    else:
        server.set(NAME, "A")
    await running.until()
    server.set(NAME, "A", "10.0.0.1")
    await running.until("decode-10.0.0.1-8000")


async def test_one_empty_answer_is_not_believed(
    server: DnsServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "EMPTY_AGAIN_S", 0.5)
    server.set(NAME, "A", "10.0.0.1")
    running = await follow(D)
    await running.until("decode-10.0.0.1-8000")
    for _ in range(2):
        server.forget(NAME)
        asked = len(server.asked)
        await until(lambda: len(server.asked) > asked)  # noqa: B023
        server.set(NAME, "A", "10.0.0.1")
        asked = len(server.asked)
        await until(lambda: len(server.asked) > asked + 2)  # noqa: B023
    assert not any("draining" in text or "removed" in text for text in running.events)


async def test_nothing_at_the_start_is_a_word_too(server: DnsServer, follow: Follow) -> None:
    running = await follow(D)
    await running.sources.first_words()
    assert running.ids == set()
    assert not running.router.membership.silent


async def test_an_answer_that_flaps_keeps_the_others(server: DnsServer, follow: Follow) -> None:
    server.set(NAME, "A", "10.0.0.1", "10.0.0.2")
    running = await follow(D)
    for _ in range(3):
        await running.until("decode-10.0.0.1-8000", "decode-10.0.0.2-8000")
        server.set(NAME, "A", "10.0.0.1")
        await running.until("decode-10.0.0.1-8000")
        server.set(NAME, "A", "10.0.0.1", "10.0.0.2")
    assert not any("10.0.0.1" in text and "drain" in text for text in running.events)


async def test_addresses_that_are_no_servers_are_left_out(server: DnsServer, follow: Follow) -> None:
    server.set(NAME, "A", "10.0.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1")
    running = await follow(D)
    await running.until("decode-10.0.0.1-8000")
    await running.until_event("0.0.0.0 is no server's own address")
    assert len(running.left_out) == 3
    server.set(NAME, "A", "10.0.0.1")
    await until(lambda: not running.left_out)


async def test_two_thousand(server: DnsServer, follow: Follow) -> None:
    server.set(NAME, "A", *(f"10.0.{n // 250}.{n % 250 + 1}" for n in range(2000)))
    running = await follow(D)
    await until(lambda: len(running.ids) == 2000)


async def test_keys_and_names_of_certificates(
    server: DnsServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECODE_KEY", "sesame")
    server.set(NAME, "A", "10.0.0.1")
    server.set(P["srv"], "SRV", "0 0 8001 a.llm.svc.")
    server.set("a.llm.svc", "A", "10.0.0.2")
    running = await follow({**D, "api_key": {"env": "DECODE_KEY"}}, P, instance_tls={})
    await running.until("decode-10.0.0.1-8000", "prefill-10.0.0.2-8001")
    d, p = (running[name] for name in sorted(running.ids))
    assert (d.api_key, d.tls_name) == ("sesame", NAME)
    assert (p.api_key, p.tls_name) == (None, "a.llm.svc")


async def test_a_key_that_cannot_be_read_any_more_keeps_what_was_known(
    server: DnsServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECODE_KEY", "sesame")
    server.set(NAME, "A", "10.0.0.1")
    running = await follow({**D, "api_key": {"env": "DECODE_KEY"}})
    await running.until("decode-10.0.0.1-8000")
    monkeypatch.delenv("DECODE_KEY")
    server.set(NAME, "A", "10.0.0.2")
    await running.until_event("environment variable DECODE_KEY is not set; the instances")
    assert running.ids == {"decode-10.0.0.1-8000"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"type": "dns", "role": "decode"}, 'give either "name" and "port", or "srv"'),
        ({**D, "srv": "_http._tcp.a"}, 'give either "name" and "port", or "srv"'),
        ({"type": "dns", "role": "decode", "name": "a"}, '"name" needs a "port"'),
        ({**P, "port": 1}, '"port" belongs to "name"'),
        ({**D, "role": "both"}, "role: must be"),
        ({**D, "name": "10.0.0.1"}, "name: must be a DNS name"),
        ({**D, "name": "http://a"}, "name: must be a DNS name"),
        ({**D, "resolver": "dns.example"}, "resolver: must be the IP address of a DNS server"),
        ({**D, "resolver": "10.0.0.1:0"}, "resolver: must be the IP address of a DNS server"),
        ({**D, "resolver": "0.0.0.0"}, "resolver: must be the IP address of a DNS server"),
        ({**D, "api_key": {"env": "NO_SUCH_VARIABLE"}}, "api_key: environment variable"),
        ({**D, "nmae": "x"}, "nmae: unknown key"),
    ],
)
def test_settings_that_make_no_sense(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"discovery": [entry]})
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]
    assert caught.value.problems[0].startswith("discovery[0]")


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        (D, D, "dns:"),
        (D, {**D, "role": "prefill"}, "dns:"),
        ({"type": "docker"}, {"type": "docker", "network": "llm"}, "docker"),
        (K, {**K, "role_label": "role"}, "kubernetes:llm/app=vllm:8000"),
    ],
)
def test_two_sources_that_would_be_one(first: dict[str, Any], second: dict[str, Any], name: str) -> None:
    """Of two by one name only one would be followed."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"discovery": [first, second]})
    (problem,) = caught.value.problems
    assert problem.startswith(f"discovery[1]: is {name}")
    assert problem.endswith(" as well as discovery[0]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", ("10.0.0.1", 53)),
        ("10.0.0.1:5353", ("10.0.0.1", 5353)),
        ("fd00::1", ("fd00::1", 53)),
        ("[fd00::1]:5353", ("fd00::1", 5353)),
    ],
)
def test_resolvers(text: str, expected: tuple[str, int]) -> None:
    assert resolver_address(text) == expected


async def test_following_ends_at_once_while_a_server_hangs(server: DnsServer, follow: Follow) -> None:
    server.fault = "silent"
    running = await follow(D)
    await until(lambda: server.asked)
    async with asyncio.timeout(5):
        await running.sources.stop()
