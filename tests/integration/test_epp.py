"""``vllm-pd-scheduler epp`` as a chart of llm-d's starts its picker, with instances from a file."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.gateway import Gateway, GatewayStack
from tests.support.processes import Client, Process, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.sim.profile import EngineProfile


@dataclass
class Ports:
    grpc: int
    health: int
    metrics: int


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture
def stack(tmp_path: Path) -> GatewayStack:
    return GatewayStack(tmp_path, gateway=Gateway(tls=True))


@pytest.fixture
def ports(stack: GatewayStack) -> Ports:
    return Ports(stack.ports.grpc, *unused_ports(2))


@pytest.fixture
def picker(stack: GatewayStack, fleet: Fleet, ports: Ports) -> Iterator[Process]:
    """The command line of the chart, but for the pool: what there is says the file."""
    config = stack.write_config({**fleet.config(), "admin_port": stack.admin_port})
    flags = [
        *("--zap-encoder", "json", "--config-file", "/config/default-plugins.yaml"),
        *("--grpc-health-port", str(ports.health), "--tracing=false", "-v=2"),
        *(f"--grpc-port={ports.grpc}", f"--metrics-port={ports.metrics}", "--ha-enable-leader-election"),
        f"--config={config}",
    ]
    command = [sys.executable, "-m", "vllm_pd_scheduler", "epp", *flags]
    with spawned(command, NAMESPACE="llm", POD_NAME="epp-0") as process:
        yield process
        assert "Traceback" not in process.output


@pytest.fixture
async def stub(ports: Ports) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.health}") as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def status(stub: health_pb2_grpc.HealthStub, name: str) -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    return int((await stub.Check(request, timeout=HUNG_S, wait_for_ready=True)).status)


@pytest.fixture
async def client(
    session: aiohttp.ClientSession, stack: GatewayStack, fleet: Fleet, picker: Process
) -> AsyncIterator[Client]:
    """Through a gateway, which encrypts and does not ask whose certificate that is."""
    with spawned(stack.envoy()) as envoy:
        client = Client(session, stack, fleet)

        async def reached() -> bool:
            assert envoy.process.poll() is None, envoy.output
            assert picker.process.poll() is None, picker.output
            try:
                return "x-pd-prefill" in (await client.complete()).headers
            except aiohttp.ClientConnectionError:
                return False

        await until(reached)
        yield client


async def test_it_serves_encrypted_and_says_what_it_does_not_follow(client: Client, picker: Process) -> None:
    assert (await client.complete()).status == 200
    lines = [json.loads(line) for line in picker.lines()]
    notes = [line["message"] for line in lines if line["logger"].endswith("cli.epp")]
    assert [note.partition(" is ignored")[0] for note in notes] == [
        "--config-file=/config/default-plugins.yaml",
        "--ha-enable-leader-election",
    ]


async def test_metrics_are_open_and_the_admin_interface_is_not(
    client: Client, ports: Ports, stack: GatewayStack
) -> None:
    url = f"http://127.0.0.1:{ports.metrics}"
    async with client.session.get(f"{url}/metrics") as answer:
        assert "pd_scheduler_requests_total" in await answer.text()
    for path, expected in (("/healthz", 200), ("/readyz", 200), ("/instances", 404), ("/config", 404)):
        async with client.session.get(url + path) as answer:
            assert answer.status == expected, path
    (status, _) = await client.admin("GET", "/status")
    assert status == 200, "on loopback"


async def test_a_drain_is_seen_before_it_ends(
    client: Client, picker: Process, stub: health_pb2_grpc.HealthStub, fleet: Fleet
) -> None:
    names = ("liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension")
    assert [await status(stub, name) for name in names] == [1, 1, 1, 1]
    await client.fault("decode-0", mute=2)
    body = {"prompt": "x", "max_tokens": 50, "stream": True}
    async with client.session.post(client.stack.url + "/v1/completions", json=body) as answer:
        await answer.content.readany()
        picker.signal(signal.SIGTERM)

        async def seen() -> bool:
            return [await status(stub, name) for name in names] == [1, 2, 2, 2]

        await until(seen)
        await client.fault("decode-0")
        other = await client.complete()
        assert other.status == 200
        assert "x-pd-prefill" in other.headers, "it goes on to serve"
    assert await asyncio.to_thread(picker.wait) == 0


async def test_without_the_package_for_certificates(
    stack: GatewayStack, fleet: Fleet, tmp_path: Path
) -> None:
    """It says what to install."""
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "cryptography.py").write_text("raise ImportError")
    config = stack.write_config(fleet.config())
    command = [sys.executable, "-m", "vllm_pd_scheduler", "epp", f"--config={config}"]
    environment: dict[str, Any] = {"PYTHONPATH": f"{tmp_path}/absent:" + ":".join(filter(None, sys.path))}
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environment)
    _, error = await process.communicate()
    assert process.returncode == 2
    assert b"grpc_tls: self_signed needs the package cryptography" in error
