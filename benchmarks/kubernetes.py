"""What a cluster's changes cost, and how soon they count. ``python -m benchmarks.kubernetes [appear …]``.

``appear``
    1,000 pods are created, get an address and become ready. How long is it until the last one is in EDS, and
    how much CPU has the scheduler used for it?
``delete``
    A pod is deleted under load, again and again. How long after that does it get its last new request?
``outage``
    The API server is away for ``--seconds`` under load. How many requests fail?
``rollout``
    All pods of a fleet are replaced one after another under ``--rate`` requests/s, half of them streams. How
    many requests fail, and how many streams are cut?

The API server is that of the tests, the instances are simulated, scheduler and Envoy are real.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from envoy.service.discovery.v3 import discovery_pb2
from tests.support.kubernetes import ApiServer
from tests.support.kubernetes_objects import pod
from tests.support.pods import Pods
from tests.support.processes import Client, Process, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

from vllm_pd_scheduler.envoy.eds import SERVICE
from vllm_pd_scheduler.sim.fleet import DECODE_PORT_OFFSET
from vllm_pd_scheduler.sim.profile import EngineProfile

PODS = 1000
DELETES = 20
FAST = EngineProfile.instant().arguments()
SLOWER = ("--decode-base=0.01",)


def cpu_seconds(process: Process) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settings(server: ApiServer, directory: str, port: int) -> dict[str, Any]:
    path = server.kubeconfig(Path(directory) / "kubeconfig")
    entry = {"type": "kubernetes", "selector": "app=vllm", "ports": [port], "kubeconfig": path}
    return {"discovery": [entry], "health_check_interval": 5.0}


async def appear() -> None:
    """Measure how long pods take to be in EDS."""
    port = unused_ports(1)[0]
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(Path(directory))
        # One server answers for all pods: it listens on all addresses of this machine.
        with Fleet(0, 1, host="0.0.0.0", base_port=port - DECODE_PORT_OFFSET):
            async with ApiServer() as server:
                with spawned(stack.serve(settings(server, directory, port))) as process:
                    await until(lambda: "serving ext_proc" in process.output)
                    await until(lambda: server.watches)
                    await create_all(server, process, stack.ports.grpc)


async def create_all(server: ApiServer, process: Process, port: int) -> None:
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", [("grpc.max_receive_message_length", -1)]
    ) as channel:
        told, subscribed = subscribe(channel)
        await until(lambda: len(told) == 2)
        used, begun = cpu_seconds(process), time.perf_counter()
        for step in range(3):  # created, has an address, is ready
            for number in range(PODS):
                role = "decode" if number % 2 else "prefill"
                address = f"127.1.{number >> 8}.{number & 255}" if step else None
                server.put("pods", pod(f"pod-{number}", address, role, ready=step == 2))
                if number % 50 == 0:
                    await asyncio.sleep(0)  # they are sent
        watched = time.perf_counter()
        await until(lambda: sum(told.values()) == PODS)
        ended = time.perf_counter()
        print(f"appear: the API server told all {PODS} pods in {watched - begun:.2f} s;")
        print(f"  the last one was in EDS {ended - watched:.2f} s after that;")
        print(f"  the scheduler used {cpu_seconds(process) - used:.2f} s of CPU until then", end="")
        await asyncio.sleep(10)
        print(f", and {cpu_seconds(process) - used:.2f} s in all 10 s later, with health checks")
        subscribed.cancel()


def subscribe(channel: grpc.aio.Channel) -> tuple[dict[str, int], asyncio.Task[None]]:
    """Ask for both roles; return how many endpoints of each were told last."""
    told: dict[str, int] = {}

    async def follow() -> None:
        stream = channel.stream_stream(
            f"/{SERVICE}/StreamEndpoints",
            request_serializer=discovery_pb2.DiscoveryRequest.SerializeToString,
            response_deserializer=discovery_pb2.DiscoveryResponse.FromString,
        )()
        names = ["prefill", "decode"]
        await stream.write(discovery_pb2.DiscoveryRequest(resource_names=names))
        async for response in stream:
            for resource in response.resources:
                found = assignment(resource.value)
                told[found.cluster_name] = sum(len(each.lb_endpoints) for each in found.endpoints)
            await stream.write(
                discovery_pb2.DiscoveryRequest(
                    resource_names=names, version_info=response.version_info, response_nonce=response.nonce
                )
            )

    return told, asyncio.ensure_future(follow())


def assignment(data: bytes) -> Any:
    from envoy.config.endpoint.v3 import endpoint_pb2

    return endpoint_pb2.ClusterLoadAssignment.FromString(data)


@dataclass
class Load:
    """Requests at a steady rate, and what their clients saw."""

    client: Client
    rate: float
    tokens: int
    streams: bool = True
    sent: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    on_answer: Callable[[str], None] = lambda _: None
    """Called with the name of the D when an answer's headers come."""

    async def run(self, ending: asyncio.Event) -> None:
        """Send until told to end; then wait for all answers."""
        running: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not ending.is_set():
            task = asyncio.ensure_future(self._one(self.streams and self.sent % 2 == 0))
            running.add(task)
            task.add_done_callback(running.discard)
            self.sent += 1
            due += 1 / self.rate
            await asyncio.sleep(max(0.0, due - loop.time()))
        await asyncio.gather(*running)

    async def _one(self, stream: bool) -> None:
        body = {"prompt": f"{self.sent} is a number", "max_tokens": self.tokens, "ignore_eos": True}
        try:
            async with self.client.session.post(
                f"{self.client.stack.url}/v1/completions", json={**body, "stream": stream}
            ) as response:
                self.on_answer(response.headers.get("x-pd-decode", ""))
                text = await response.read()
                if response.status != 200:
                    self.errors[f"{response.status} {text[:120]!r}"] += 1
                elif stream and not text.endswith(b"data: [DONE]\n\n"):
                    self.errors["cut stream"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.errors[type(error).__name__] += 1


@asynccontextmanager
async def fleet(
    count: int, arguments: tuple[str, ...], **more: Any
) -> AsyncIterator[tuple[Client, Pods, Process]]:
    """Run a fleet of so many P and D, and a scheduler with its Envoy."""
    async with ApiServer() as server, Pods(server, arguments) as pods:
        for number in range(count):
            await asyncio.gather(*(pods.run(f"{role}-{number}", role) for role in ("prefill", "decode")))
        with tempfile.TemporaryDirectory() as directory:
            stack = Stack(Path(directory))
            config = {**settings(server, directory, pods.port), "health_check_interval": 1.0, **more}
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=120)
            async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
                with spawned(stack.up(config)) as process:
                    client = Client(session, stack, Fleet())
                    await ready(client, process)
                    await client.until_split()
                    yield client, pods, process


@asynccontextmanager
async def under(load: Load) -> AsyncIterator[None]:
    ending = asyncio.Event()
    running = asyncio.ensure_future(load.run(ending))
    try:
        yield
    finally:
        ending.set()
        await running


async def delete(rate: float) -> None:
    """Measure how long a deleted pod gets requests."""
    last: dict[str, float] = {}

    def answered(name: str) -> None:
        last[name] = time.perf_counter()

    async with fleet(2, tuple(FAST)) as (client, pods, _):
        load = Load(client, rate, tokens=1, streams=False, on_answer=answered)
        delays = []
        async with under(load):
            for number in range(DELETES):
                name = f"decode-{number % 2}"
                found = pods.server.get("pods", name)
                await until(lambda: time.perf_counter() - last.get(name, 0.0) < 0.02)  # noqa: B023
                begun = time.perf_counter()
                pods.delete(name)
                await asyncio.sleep(1.0)
                delays.append(max(0.0, last[name] - begun))
                pods.server.put("pods", found)

                async def back() -> bool:
                    return (await client.states()).get(name) == "healthy"  # noqa: B023

                await until(back)
    print(f"delete: the last answer of a deleted pod began {statistics.median(delays) * 1000:.0f} ms after")
    print(
        f"  the event (median of {DELETES}; at most {max(delays) * 1000:.0f} ms), with {rate:g} requests/s;"
    )
    print(f"  {load.sent} requests, errors: {dict(load.errors) or 0}")


async def outage(rate: float, seconds: float) -> None:
    """Count what fails while the API server is away."""
    async with fleet(2, SLOWER) as (client, pods, process):
        load = Load(client, rate, tokens=20)
        async with under(load):
            await pods.server.down()
            await asyncio.sleep(seconds)
            told = process.output.count("the instances that were known stay")
            _, ready_answer = await client.admin("GET", "/readyz")
            begun = time.perf_counter()
            await pods.server.up()
            pods.delete("decode-0")

            async def drained() -> bool:
                return "decode-0" not in await client.states()

            await until(drained)
            healed = time.perf_counter() - begun
    print(f"outage: {seconds:g} s without the API server at {rate:g} requests/s; {load.sent} requests,")
    print(f"  errors: {dict(load.errors) or 0}; the log told it {told} times, /readyz {ready_answer};")
    print(f"  a pod that was deleted when it came back was gone {healed:.1f} s later")


async def rollout(rate: float) -> None:
    """Count what fails while all pods are replaced."""
    async with fleet(3, SLOWER) as (client, pods, _):
        load = Load(client, rate, tokens=30)
        begun = time.perf_counter()
        async with under(load):
            for old in pods.names:
                role = old.partition("-")[0]
                await pods.run(f"new-{old}", role)

                async def serves() -> bool:
                    return (await client.states()).get(f"new-{old}") == "healthy"  # noqa: B023

                await until(serves)
                pods.delete(old)

                async def gone() -> bool:
                    return old not in await client.states()  # noqa: B023

                await until(gone)
                await pods.end(old)
        took = time.perf_counter() - begun
    print(f"rollout: 6 pods replaced in {took:.0f} s at {rate:g} requests/s, half of them streams;")
    print(f"  {load.sent} requests, errors: {dict(load.errors) or 0}")


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = ("appear", "delete", "outage", "rollout")
    parser.add_argument("what", nargs="*", choices=(*choices, []), help="what to measure; all by default")
    parser.add_argument("--rate", type=float, default=200.0, help="requests/s")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the API server is away")
    given = parser.parse_args()
    for what in given.what or choices:
        match what:
            case "appear":
                await appear()
            case "delete":
                await delete(given.rate)
            case "outage":
                await outage(given.rate, given.seconds)
            case "rollout":
                await rollout(given.rate)


if __name__ == "__main__":
    asyncio.run(main())
