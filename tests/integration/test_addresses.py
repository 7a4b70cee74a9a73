"""Where instances are: a DNS that fails, addresses in another spelling, two names of one server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

WITH_A_RESOLVER = """
import json, os, socket, time

real = socket.getaddrinfo

def getaddrinfo(host, *args, **kwargs):
    if str(host).startswith("vllm-"):
        dns = json.load(open(os.environ["TEST_DNS"]))
        if dns == "hangs":
            time.sleep(600)
        if host not in dns:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        host = dns[host]
    return real(host, *args, **kwargs)

socket.getaddrinfo = getaddrinfo
from vllm_pd_scheduler.cli import app
app()
"""
"""The scheduler's command line, whose DNS is a file."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 2, profile=EngineProfile.instant()) as running:
        yield running


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


class Dns:
    """What the scheduler's resolver finds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, answers: dict[str, str] | str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(answers))
        new.replace(self.path)


def named(fleet: Fleet) -> dict[str, Any]:
    """The fleet's configuration, each instance by a name."""
    config = fleet.config()
    for role in ("prefill", "decode"):
        for item in config[f"{role}_instances"]:
            item["host"] = f"vllm-{item['id']}"
    return config


def with_resolver(command: list[str]) -> list[str]:
    """The command, ``python -m vllm_pd_scheduler …``, with a DNS that is a file."""
    assert command[1:3] == ["-m", "vllm_pd_scheduler"]
    return [sys.executable, "-c", WITH_A_RESOLVER, *command[3:]]


@contextlib.asynccontextmanager
async def running(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, config: dict[str, Any], dns: Dns
) -> AsyncIterator[tuple[Client, Process]]:
    config = {"strategy": "round_robin", **NO_EJECTION, **config}
    with spawned(with_resolver(stack.up(config)), TEST_DNS=str(dns.path)) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        yield client, process
        assert "Traceback" not in process.output, process.output


@pytest_asyncio.fixture
async def dns(tmp_path: Path, fleet: Fleet) -> Dns:
    made = Dns(tmp_path / "dns.json")
    made.set({f"vllm-{instance.id}": "127.0.0.1" for instance in fleet.instances})
    return made


async def age(client: Client, instance_id: str) -> float:
    """How old the address of an instance is, as the metrics say it."""
    _, page = await client.admin("GET", "/metrics")
    (line,) = [line for line in page.splitlines() if f'address_age_seconds{{instance="{instance_id}"' in line]
    return float(line.rpartition(" ")[2])


async def failed(client: Client, instance_id: str, times: int) -> None:
    """Wait until so many resets were told of an instance."""
    series = f'pd_scheduler_decode_attempt_failures_total{{decode="{instance_id}",failure="reset"}} {times}.0'

    async def told() -> bool:
        return series in (await client.admin("GET", "/metrics"))[1]

    await until(told)


@pytest.mark.parametrize("outage", [{}, "hangs"], ids=["fails", "hangs"])
async def test_a_dns_outage_is_no_dead_fleet(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, dns: Dns, outage: dict[str, str] | str
) -> None:
    async with running(session, stack, fleet, named(fleet), dns) as (client, process):
        dns.set(outage)

        async def old() -> bool:
            assert (await client.complete()).status == 200
            return min([await age(client, each.id) for each in fleet.instances]) > 2.5  # five intervals

        await until(old)
        assert set((await client.states()).values()) == {"healthy"}
        said = "stays in use"
        expected = 3 if outage == {} else 0
        await process.says(said, expected)
        assert process.output.count(said) == expected, "once for each, not for each look-up"
        dns.set({f"vllm-{instance.id}": "127.0.0.1" for instance in fleet.instances})
        if outage == {}:

            async def fresh() -> bool:
                return max([await age(client, each.id) for each in fleet.instances]) < 1.0

            await until(fresh)


async def test_a_start_without_dns_serves_as_soon_as_there_is_one(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, dns: Dns
) -> None:
    answers = json.loads(dns.path.read_text())
    dns.set({})
    command = with_resolver(stack.up({"strategy": "round_robin", **named(fleet)}))
    with spawned(command, TEST_DNS=str(dns.path)) as process:
        client = Client(session, stack, fleet)

        async def told() -> bool:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                return set((await client.states()).values()) == {"unhealthy"}
            return False

        await until(told)
        why = "the name vllm-decode-0 cannot be resolved: Temporary failure in name resolution"
        assert (await client.instance("decode-0"))["reason"] == why
        await process.says(f"decode-0 is unhealthy: {why}")
        dns.set(answers)
        await ready(client, process)
        assert (await client.complete()).status == 200


async def test_two_names_of_one_server_are_one_endpoint(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, dns: Dns
) -> None:
    config = named(fleet)
    first = config["decode_instances"][0]
    config["decode_instances"].append({**first, "id": "twin", "host": "vllm-twin"})
    dns.set({**json.loads(dns.path.read_text()), "vllm-twin": "127.0.0.1"})
    async with running(session, stack, fleet, config, dns) as (client, process):
        answers = [await client.complete() for _ in range(9)]
        assert {answer.status for answer in answers} == {200}
        hosts = await client.envoy_hosts()
        assert hosts[f"decode 127.0.0.1:{first['port']}"] == "HEALTHY"
        assert sum(name.startswith("decode ") for name in hosts) == 2
        assert set((await client.states()).values()) == {"healthy"}
        same = f"twin: its address 127.0.0.1:{first['port']} is that of decode-0: they are one server"
        await until(lambda: same in process.output)  # by the second probe, if both are asked at once first
        assert process.output.count(same) == 1
        # What fails is told of the first, whichever was chosen; and the other lives on without it.
        for times in range(1, 4):
            await client.fault("decode-0", reset=True, times=1)
            assert {(await client.complete()).status for _ in range(4)} == {200}
            await failed(client, "decode-0", times)
        assert (await client.admin("DELETE", "/instances/decode-0"))[0] == 204
        answers = [await client.complete() for _ in range(6)]
        assert {answer.status for answer in answers} == {200}
        assert (await client.envoy_hosts())[f"decode 127.0.0.1:{first['port']}"] == "HEALTHY"


async def test_an_ipv6_address_in_another_spelling(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, dns: Dns
) -> None:
    """Envoy sends a request to the host that was chosen only if that is spelled as Envoy spells it."""
    config = fleet.config()
    for item, host in zip(config["decode_instances"], ("0:0:0:0:0:0:0:1", "[0::0:1]"), strict=True):
        item["host"] = host
    async with contextlib.AsyncExitStack() as exits:
        for item in config["decode_instances"]:
            server = await asyncio.start_server(_forward_to(item["port"]), "::1", item["port"])
            exits.push_async_callback(_close, server)
        async with running(session, stack, fleet, config, dns) as (client, _):
            chosen = [(await client.complete()).headers["x-pd-decode"] for _ in range(8)]
            assert chosen == ["decode-0", "decode-1"] * 4 or chosen == ["decode-1", "decode-0"] * 4
            for each in ("decode-0", "decode-1"):
                assert (await client.instance(each))["host"] == "::1"
                await client.fault(each, reset=True, times=1)
                # Not one prompt for all: what two instances have lost is tried on no third.
                answers = [await client.complete(prompt=f"{number} for {each}") for number in range(2)]
                assert {answer.status for answer in answers} == {200}
                await failed(client, each, 1)
            status, answer = await client.admin(
                "POST",
                "/instances",
                {"id": "again", "role": "decode", "host": "::0001", "port": item["port"]},
            )
            assert (status, "is already the decode instance 'decode-1'" in answer["error"]) == (409, True)


def _forward_to(port: int) -> Any:
    """A handler of connections that passes them on to the same port of 127.0.0.1."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        if reader.exception() is not None:
            writer.transport.abort()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pipe(reader, there_writer), pipe(there_reader, writer))

    return handle


async def _close(server: asyncio.Server) -> None:
    server.close()
