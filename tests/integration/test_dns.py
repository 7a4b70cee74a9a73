"""A fleet behind DNS names, under requests: servers that come, go and flap, and a DNS that is away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.integration.test_discovery import events, load, running, until_states
from tests.support.dns_server import DnsServer, dns_server
from tests.support.overload import PATIENT
from tests.support.processes import Client, Stack, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.fleet import DECODE_PORT_OFFSET

NAME = "vllm-decode.llm.svc"
SRV = "_http._tcp.vllm-prefill.llm.svc"
HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")


@pytest.fixture(scope="module")
def port() -> int:
    return unused_ports(1)[0]


@pytest.fixture(scope="module")
def decode(port: int) -> Iterator[dict[str, Fleet]]:
    """One D at each address, all at one port."""
    base = port - DECODE_PORT_OFFSET
    with ExitStack() as stack:
        yield {
            host: stack.enter_context(
                Fleet(0, 1, host=host, base_port=base, arguments=["--decode-base=0.005"])
            )
            for host in HOSTS
        }


@pytest.fixture(scope="module")
def prefill() -> Iterator[Fleet]:
    with Fleet(1, 0) as fleet:
        yield fleet


@pytest_asyncio.fixture
async def dns(decode: dict[str, Fleet], prefill: Fleet) -> AsyncIterator[DnsServer]:
    async with dns_server() as server:
        server.set(NAME, "A", *HOSTS)
        server.set(SRV, "SRV", f"0 0 {prefill.prefill[0].port} p0.vllm-prefill.llm.svc.")
        server.along("p0.vllm-prefill.llm.svc.", "A", "127.0.0.1")
        yield server


@pytest.fixture
def settings(dns: DnsServer, port: int) -> dict[str, Any]:
    at = {"type": "dns", "resolver": f"127.0.0.1:{dns.port}"}
    sources = [{**at, "role": "decode", "name": NAME, "port": port}, {**at, "role": "prefill", "srv": SRV}]
    # Drained is who says itself, at a health check, that nothing runs there.
    return {**PATIENT, "health_check_interval": 0.5, "discovery": sources}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


async def test_servers_that_come_and_go_cost_no_request(
    session: aiohttp.ClientSession,
    stack: Stack,
    dns: DnsServer,
    settings: dict[str, Any],
    prefill: Fleet,
    port: int,
) -> None:
    ids = [f"decode-{host}-{port}" for host in HOSTS]
    async with running(session, stack, prefill, settings) as (client, process):
        assert (await client.instance(ids[0]))["source"] == f"dns:{NAME}:{port}"
        async with load(client):
            for _ in range(2):  # it flaps
                dns.set(NAME, "A", *HOSTS[1:])
                await until_states(client, **{ids[0]: "gone"})
                dns.set(NAME, "A", *HOSTS)
                await until_states(client, **dict.fromkeys(ids, "healthy"))
            dns.fault = "servfail"
            await until_age(client, NAME, 3.0)
            assert set(await client.states()) > set(ids)
            dns.fault = None
            dns.forget(NAME)  # one answer, and gone again
            asked = len(dns.asked)
            await until(lambda: len(dns.asked) > asked + 2)
            dns.set(NAME, "A", *HOSTS[:2])
            await until_states(client, **{ids[2]: "gone", ids[1]: "healthy", ids[0]: "healthy"})
        said = await events(client, "discovery")
        assert sum("SERVFAIL; the instances that were known stay" in text for text in said) == 2, said
        assert sum("all is well again" in text for text in said) == 2, said
        assert "Traceback" not in process.output


async def test_a_stream_on_a_server_that_is_named_no_more_ends_first(
    session: aiohttp.ClientSession,
    stack: Stack,
    dns: DnsServer,
    settings: dict[str, Any],
    prefill: Fleet,
    decode: dict[str, Fleet],
    port: int,
) -> None:
    async with running(session, stack, prefill, settings) as (client, _):
        async with client.held_stream([each["decode-0"] for each in decode.values()]) as stream:
            name = stream.headers["x-pd-decode"]
            host = name.split("-")[1]
            dns.set(NAME, "A", *(each for each in HOSTS if each != host))
            await until_states(client, **{name: "draining"})
            assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
        await until_states(client, **{name: "gone"})
        dns.forget(NAME)  # scaled to zero
        await until_states(client, **{f"decode-{host}-{port}": "gone" for host in HOSTS})
        assert (await client.complete()).status == 503


async def until_age(client: Client, name: str, seconds: float) -> None:
    """Wait until a source has said nothing for so long."""

    async def so() -> bool:
        _, text = await client.admin("GET", "/metrics")
        ages = [
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith("pd_scheduler_discovery_age_seconds{") and name in line
        ]
        return bool(ages) and ages[0] > seconds

    await until(so)
