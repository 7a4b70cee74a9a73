"""The processes themselves: who ends whom, what a signal does, and Envoy without the scheduler."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import aiohttp
import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.overload import PATIENT
from tests.support.processes import (
    NO_EJECTION,
    Client,
    Process,
    Stack,
    ready,
    running,
    spawned,
    unused_ports,
)
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.sim.fleet import DECODE_PORT_OFFSET
from vllm_pd_scheduler.sim.profile import EngineProfile

STREAM = {"prompt": "p", "max_tokens": 75, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    """A fleet that takes its time: 20 ms a token."""
    with Fleet(1, 1, arguments=["--decode-base=0.02"]) as running_fleet:
        yield running_fleet


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


# -- up


async def test_sigterm_drains_and_ends_both(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    with spawned(stack.up({**PATIENT, **fleet.config()})) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        (envoy,) = process.children()
        async with client.held_stream() as stream:
            process.signal(signal.SIGTERM)

            async def not_ready() -> bool:
                return (await client.admin("GET", "/readyz"))[0] == 503

            await until(not_ready)
            assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.to_thread(process.wait) == 0
        assert not running(envoy)
        assert "Traceback" not in process.output


async def test_a_drain_ends_after_its_timeout(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    with spawned(stack.up({**PATIENT, **fleet.config(), "drain_timeout": 0.2})) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        async with client.held_stream() as stream:
            process.signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait) == 0
            with pytest.raises(aiohttp.ClientPayloadError):  # cut, not ended as if complete
                await stream.rest()
        assert "1 requests still run after drain_timeout" in process.output


async def test_when_envoy_dies_all_ends(session: aiohttp.ClientSession, stack: Stack, fleet: Fleet) -> None:
    with spawned(stack.up(fleet.config())) as process:
        await ready(Client(session, stack, fleet), process)
        (envoy,) = process.children()
        os.kill(envoy, signal.SIGKILL)
        assert await asyncio.to_thread(process.wait) == 1
        assert "Envoy ended" in process.output
        assert "Traceback" not in process.output


async def test_when_the_scheduler_is_killed_envoy_ends(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    with spawned(stack.up(fleet.config())) as process:
        await ready(Client(session, stack, fleet), process)
        (envoy,) = process.children()
        process.signal(signal.SIGKILL)

        async def ended() -> bool:
            return not running(envoy)

        await until(ended)


async def test_what_a_killed_one_leaves_is_gone_with_the_next(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    with tempfile.TemporaryDirectory(prefix="pd-") as temporary:  # a socket's path must be short
        for number in (signal.SIGKILL, signal.SIGTERM):
            with spawned(stack.up(fleet.config()), TMPDIR=temporary) as process:
                await ready(Client(session, stack, fleet), process)
                (envoy,) = process.children()
                process.signal(number)
                await asyncio.to_thread(process.wait)

                def ended(pid: int = envoy) -> bool:
                    return not running(pid)

                await until(ended)
        assert os.listdir(temporary) == []


@pytest.mark.parametrize("which", ["ingress", "prefill", "envoy_admin", "grpc", "admin"])
async def test_a_port_in_use_is_a_clear_error(stack: Stack, fleet: Fleet, which: str) -> None:
    of_envoy = stack.ports
    port = {
        "ingress": of_envoy.ingress,
        "prefill": of_envoy.prefill,
        "envoy_admin": of_envoy.admin,
        "grpc": of_envoy.grpc,
        "admin": stack.admin_port,
    }[which]
    settings = {**fleet.config(), **stack.listener}
    command = [*stack.up(settings), *([f"--grpc-port={port}"] if which == "grpc" else [])]
    with socket.create_server(("127.0.0.1", port)), spawned(command) as process:
        assert await asyncio.to_thread(process.wait) == 1
        assert str(port) in process.output
        assert "Traceback" not in process.output


@pytest.mark.parametrize("which", ["ingress", "prefill", "admin"])
async def test_a_port_of_another_envoy_is_not_shared(
    stack: Stack, fleet: Fleet, tmp_path: Path, which: str
) -> None:
    """Envoy would: it sets SO_REUSEPORT, and each of the two would get a part of the requests."""
    taken = getattr(stack.ports, which)
    other = Stack(tmp_path / "other")
    other.directory.mkdir()
    other.ports = replace(other.ports, **{which: taken})
    with spawned(stack.envoy()) as envoy:

        async def listens() -> bool:
            assert envoy.process.poll() is None, envoy.output
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", taken)
            except ConnectionError:
                return False
            writer.close()
            return True

        await until(listens)
        with spawned(other.up({**fleet.config(), **other.listener})) as process:
            assert await asyncio.to_thread(process.wait) == 1
            option = {"ingress": "--port", "prefill": "--prefill-port", "admin": "--envoy-admin-port"}[which]
            assert f"vllm-pd-scheduler: {option}: Envoy cannot listen on " in process.output
            assert f"ss -ltnp 'sport = :{taken}'" in process.output


async def test_two_of_its_own_listeners_at_one_port(stack: Stack, fleet: Fleet) -> None:
    stack.ports = replace(stack.ports, admin=stack.admin_port)
    with spawned(stack.up(fleet.config())) as process:
        assert await asyncio.to_thread(process.wait) == 1
        expected = f"--envoy-admin-port: 127.0.0.1:{stack.admin_port} is where admin_port listens already"
        assert expected in process.output


async def test_an_instance_that_is_envoy_itself(stack: Stack, fleet: Fleet) -> None:
    """Each request would go round for ever."""
    config = fleet.config()
    config["decode_instances"].append({"id": "loop", "host": "localhost", "port": stack.ports.ingress})
    with spawned(stack.up(config)) as process:
        assert await asyncio.to_thread(process.wait) == 1
        expected = f"decode_instances[1]: localhost:{stack.ports.ingress} is no instance, but our own --port"
        assert expected in process.output


@pytest.mark.parametrize("command", ["up", "serve"])
async def test_a_hangup_does_not_cut_a_drain(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, command: str
) -> None:
    """A closed terminal sends it, and more than once; else it is a reload, for which it is too late."""
    config = {**PATIENT, **fleet.config()}
    with spawned(stack.envoy() if command == "serve" else ["true"]) as envoy:
        with spawned(stack.up(config) if command == "up" else stack.serve(config)) as process:
            client = Client(session, stack, fleet)
            await ready(client, process)
            await client.until_split()
            async with client.held_stream() as stream:
                process.signal(signal.SIGTERM)

                async def not_ready() -> bool:
                    return (await client.admin("GET", "/readyz"))[0] == 503

                await until(not_ready)
                process.signal(signal.SIGHUP)
                assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
            assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in envoy.output


async def test_nohup_is_left_alone(session: aiohttp.ClientSession, stack: Stack, fleet: Fleet) -> None:
    with spawned(["nohup", *stack.up(fleet.config())]) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        process.signal(signal.SIGHUP)
        assert (await client.complete()).status == 200
        assert (await client.admin("GET", "/readyz"))[0] == 200


async def test_envoy_retries_as_often_as_configured(
    session: aiohttp.ClientSession, stack: Stack, tmp_path: Path
) -> None:
    """One decode instance of seven answers: with three retries most requests would fail."""
    with Fleet(1, 7, profile=EngineProfile.instant()) as fleet:
        config = {**fleet.config(), "max_retries": 6, **NO_EJECTION, "strategy": "round_robin"}
        with spawned(stack.up(config)) as process:
            client = Client(session, stack, fleet)
            await ready(client, process)
            for instance in fleet.decode[:-1]:
                await client.fault(instance.id, status=503)
            assert {(await client.complete()).status for _ in range(7)} == {200}


async def test_api_keys_are_sent_and_never_shown(
    session: aiohttp.ClientSession, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Fleet(1, 1, arguments=["--api-key=s3cret-key"]) as fleet:
        config = {**fleet.config(), "api_key": {"env": "FLEET_KEY"}}
        with spawned([*stack.up(config), "--log-level=DEBUG"], FLEET_KEY="s3cret-key") as process:
            client = Client(session, stack, fleet)
            await ready(client, process)
            answer = await client.complete()
            assert answer.status == 200
            assert answer.headers["x-pd-prefill"]
            assert "s3cret-key" not in str(await client.admin("GET", "/instances"))
            (envoy,) = process.children()
            environment = await asyncio.to_thread(Path(f"/proc/{envoy}/environ").read_bytes)
            assert b"FLEET_KEY" not in environment
            assert "s3cret-key" not in process.output
            assert "Where is the cache?" not in process.output


async def test_a_p_whose_key_is_wrong_is_passed_over(session: aiohttp.ClientSession, stack: Stack) -> None:
    """The client has no key to be wrong."""
    with Fleet(2, 1, arguments=["--api-key=s3cret-key"]) as fleet:
        config = {**fleet.config(), "api_key": {"env": "FLEET_KEY"}, "strategy": "round_robin"}
        config["prefill_instances"][0]["api_key"] = {"env": "OLD_KEY"}
        with spawned(stack.up(config), FLEET_KEY="s3cret-key", OLD_KEY="old") as process:
            client = Client(session, stack, fleet)
            await ready(client, process)
            answers = [await client.complete() for _ in range(6)]
            assert {(a.status, a.headers.get("x-pd-prefill")) for a in answers} == {(200, "prefill-1")}
            failures = 'pd_scheduler_prefill_failures_total{prefill="prefill-0",reason="status_401"}'
            _, page = await client.admin("GET", "/metrics")
            assert failures in page


# -- serve, beside an Envoy of its own


async def test_a_dead_scheduler_is_a_non_event(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    client = Client(session, stack, fleet)
    with spawned(stack.envoy()) as envoy:
        with spawned(stack.serve(fleet.config())) as scheduler:
            await ready(client, envoy)
            expected = (await client.complete()).text
            async with session.post(stack.url + "/v1/completions", json=STREAM) as response:
                await response.content.readline()
                scheduler.signal(signal.SIGKILL)
                scheduler.wait()
                for _ in range(5):
                    answer = await client.complete()
                    assert answer.text == expected
                    assert "x-pd-prefill" not in answer.headers
                    assert answer.headers["x-pd-decode"] == "decode-0"
                assert (await response.read()).endswith(b"data: [DONE]\n\n"), "running streams go on"
            assert (await client.send("GET", "/health")).status == 200
            await _check_guard(client)
        with spawned(stack.serve(fleet.config())):

            async def split_again() -> bool:
                answer = await client.complete()
                assert answer.text == expected
                return "x-pd-prefill" in answer.headers

            await until(split_again)
            await client.until_in_flight(0)


async def _check_guard(client: Client) -> None:
    """Without the scheduler, too, no hand-off of a client's gets through."""
    before = await client.seen_by_all()
    for body in (
        b'{"prompt":"p","kv_transfer_params":{}}',
        b'{"prompt":"p","kv_transfer_param\\u0073":{}}',
        b'{"prompt":"p","\\u0065c_transfer_params":{}}',
        '{"prompt":"p","kv_transfer_params":{}}'.encode("utf-16"),
        '{"prompt":"p","kv_transfer_params":{}}'.encode("utf-16-le"),
        '{"prompt":"p","kv_transfer_params":{}}'.encode("utf-32-be"),
    ):
        for method, path in (("POST", "/v1/completions"), ("POST", "/v1/responses"), ("GET", "/v1/models")):
            answer = await client.send(method, path, body)
            assert (answer.status, answer.error["type"]) == (400, "BadRequestError")
    assert await client.seen_by_all() == before
    chinese = await client.post("/v1/completions", b'{"prompt":"\\u4f60\\u597d \\u0041","max_tokens":2}')
    assert chinese.status == 200


async def test_envoy_starts_without_the_scheduler_and_finds_it_later(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    client = Client(session, stack, fleet)
    with spawned(stack.envoy()) as envoy:

        async def refused() -> bool:
            try:
                answer = await client.complete()
            except aiohttp.ClientConnectionError:
                return False
            return answer.status == 503 and bool(answer.error) and bool(answer.headers["retry-after"])

        await until(refused)
        with spawned(stack.serve(fleet.config())):
            await ready(client, envoy)

            await client.until_split()


async def test_serve_answers_grpc_health_checks(stack: Stack, fleet: Fleet) -> None:
    with spawned(stack.serve(fleet.config())) as process:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{stack.ports.grpc}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            answer = await stub.Check(request, wait_for_ready=True, timeout=HUNG_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0


# -- sim and demo


def _base_port() -> int:
    """Return a port that is unused, and whose decode instance's is too."""
    base = unused_ports(1)[0]
    while base + DECODE_PORT_OFFSET not in unused_ports(DECODE_PORT_OFFSET):
        base = unused_ports(1)[0]
    return base


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_sim_runs_until_a_signal(number: signal.Signals) -> None:
    options = ["--prefill=1", "--decode=1", f"--base-port={_base_port()}"]
    with spawned([sys.executable, "-m", "vllm_pd_scheduler", "sim", *options]) as process:
        _wait_for_output(process, "Ctrl-C ends them")
        children = process.children()
        assert len(children) == 2
        process.signal(number)
        assert process.wait() == 0
        assert not any(running(pid) for pid in children)


def test_sim_speaks_another_connector_and_says_how_it_is_configured() -> None:
    options = ["--prefill=1", "--decode=1", f"--base-port={_base_port()}", "--connector=mooncake"]
    with spawned([sys.executable, "-m", "vllm_pd_scheduler", "sim", *options]) as process:
        _wait_for_output(process, "Ctrl-C ends them")
        config = parse_config(json.loads(process.output.partition("Ctrl-C")[0]))
        assert {each.connector and each.connector.name for each in config.instances()} == {"mooncake"}
        commands = [psutil.Process(pid).cmdline() for pid in process.children()]
        assert ["--kv-connector=mooncake" in each for each in commands] == [True, True]


def test_demo_answers_and_ends_everything(stack: Stack) -> None:
    ports = stack.ports
    options = {"port": ports.ingress}
    options |= {"admin-port": stack.admin_port, "envoy-admin-port": ports.admin}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with spawned([sys.executable, "-m", "vllm_pd_scheduler", "demo", *arguments]) as process:
        _wait_for_output(process, "Ctrl-C ends everything")
        assert "prefilled by prefill-" in process.output
        lines = [line.strip() for line in process.output.splitlines()]
        ask, *others = [line for line in lines if line.startswith(("curl", "kill"))]
        children = process.children()
        assert len(children) == 5
        assert "data: [DONE]" in _shell(ask)
        assert len([_shell(line) for line in others]) == 4
        assert "data: [DONE]" in _shell(ask), "though one was killed"
        process.signal(signal.SIGINT)
        assert process.wait() == 0
        assert not any(running(pid) for pid in children)


def _shell(line: str) -> str:
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout


def _wait_for_output(process: Process, text: str) -> None:
    async def printed() -> bool:
        assert process.process.poll() is None, process.output
        return text in process.output

    asyncio.run(until(printed))
