"""Several workers with a real Envoy: one scheduler to clients and operators, whichever of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.support.load import load
from tests.support.overload import PATIENT
from tests.support.processes import NO_EJECTION, Client, Process, Stack, ready, running, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.sim.profile import EngineProfile

WORKERS = ("w0", "w1")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as found:
        yield found


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """With room for the gRPC ports of three workers."""
    grpc = unused_ports(1)[0]
    while unused_ports(2) != [grpc + 1, grpc + 2]:
        grpc = unused_ports(1)[0]
    return Stack(tmp_path, EnvoyPorts(*unused_ports(3), grpc, "127.0.0.1"))


@pytest.fixture
def settings(fleet: Fleet, tmp_path: Path) -> dict[str, Any]:
    state_file = str(tmp_path / "state.json")
    return {"strategy": "round_robin", **NO_EJECTION, "state_file": state_file, **fleet.config()}


@pytest.fixture
def up(stack: Stack, settings: dict[str, Any]) -> Iterator[Process]:
    with spawned([*stack.up(settings), "--workers=2"]) as process:
        yield process


@pytest_asyncio.fixture
async def client(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, up: Process
) -> AsyncIterator[Client]:
    client = Client(session, stack, fleet)
    await ready(client, up)
    await split_by_all(client)
    yield client
    assert "Traceback" not in up.output
    assert "lua" not in up.output, "a filter's script failed"


def pids(process: Process) -> dict[str, int]:
    """The process ids of the workers that run, by name."""
    found = {}
    for pid in process.children():
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"--worker" in arguments:
                found[f"w{arguments[arguments.index(b'--worker') + 1].decode()}"] = pid
    return found


async def counts(client: Client) -> dict[str, float]:
    """The counters on the metrics page, by name and labels."""
    status, page = await client.admin("GET", "/metrics")
    assert status == 200
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(page)
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def requests(found: dict[str, float]) -> float:
    return sum(value for name, value in found.items() if name.startswith("pd_scheduler_requests_total"))


async def deciders(client: Client, limit: int) -> Counter[str]:
    """How many of the last decisions each worker has made."""
    _, found = await client.admin("GET", f"/decisions?limit={limit}")
    return Counter(each["id"].partition(".")[0] for each in found["decisions"])


async def reachable(client: Client) -> None:
    """Wait until the admin interface answers."""

    async def answers() -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            return (await client.admin("GET", "/healthz"))[0] == 200
        return False

    await until(answers)


async def started_again(process: Process, worker: str, before: int) -> None:
    """Wait until another process serves in a worker's place."""

    def serves() -> bool:
        served = process.output.count(f"worker {worker}: serving")
        return served >= 2 and pids(process).get(worker, before) != before

    await until(serves)


async def test_all_share_the_requests_and_one_page_counts_them(client: Client) -> None:
    before = requests(await counts(client))
    answers = [await client.complete() for _ in range(40)]
    assert all("x-pd-prefill" in each.headers for each in answers)

    async def shared() -> bool:
        return await deciders(client, 40) == {"w0": 20, "w1": 20}

    await until(shared)  # a worker that does not answer the first one in time is left out

    async def counted() -> bool:
        found = await counts(client)
        ended = found["pd_scheduler_responses_total[('outcome', 'ok')]"]
        return requests(found) == before + 40 == ended

    await until(counted)  # what Envoy tells comes a second later


async def test_an_advice_is_made_of_the_traffic_of_all(session: aiohttp.ClientSession, stack: Stack) -> None:
    with (
        Fleet(1, 1, arguments=["--decode-base=0.02"]) as fleet,
        spawned([*stack.up({"health_check_interval": 0.2, **fleet.config()}), "--workers=2"]) as process,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        sent = 0

        async def counted() -> bool:
            nonlocal sent
            answers = [client.complete(max_tokens=20, ignore_eos=True) for _ in range(4)]
            sent += len(await asyncio.gather(*answers))
            _, found = await client.admin("GET", "/advice?minutes=15")
            return str(found["text"]).startswith(f"not enough traffic seen: {sent} requests")

        await until(counted)
        assert len(await deciders(client, sent)) == 2


async def test_a_decision_of_any_worker_is_explained(client: Client) -> None:
    for _ in range(4):
        answer = await client.complete()
        request = answer.headers["x-request-id"]
        _, found = await client.admin("GET", f"/decisions?request_id={request}")
        (decision,) = found["decisions"]
        assert decision["prefill"]["picked"] == answer.headers["x-pd-prefill"]
    assert len(await deciders(client, 4)) == 2


async def test_decisions_can_be_followed(client: Client) -> None:
    _, found = await client.admin("GET", "/decisions?limit=1")
    last = found["decisions"][0]["number"] if found["decisions"] else 0
    for _ in range(6):
        sent = [(await client.complete()).headers["x-request-id"] for _ in range(3)]
        _, found = await client.admin("GET", f"/decisions?since={last}")
        numbers = [each["number"] for each in found["decisions"]]
        assert [each["request_id"] for each in found["decisions"]] == sent[::-1]
        assert numbers == sorted(numbers, reverse=True)
        last = numbers[0]


@pytest.mark.parametrize("dead", WORKERS)
async def test_one_that_is_killed_is_a_non_event(client: Client, up: Process, dead: str) -> None:
    async with load(client) as seen:
        await seen.more()
        before, pid = await counts(client), pids(up)[dead]
        os.kill(pid, signal.SIGKILL)
        await reachable(client)
        await seen.more()
        meanwhile = await counts(client)
        await started_again(up, dead, pid)
        await seen.more(60)
    seen.assert_clean()
    after = await counts(client)
    await up.says(f"worker {dead} (process {pid}) was ended by SIGKILL")
    for name, value in before.items():
        assert meanwhile[name] >= value, f"{name} has fallen"
        assert after[name] >= meanwhile[name], f"{name} has fallen"
    await split_by_all(client)
    await client.until_in_flight(0)


async def test_the_counts_are_exact_after_a_death(client: Client, up: Process) -> None:
    """What was told before a worker has died is told afterwards, once."""
    before = requests(await counts(client))
    for number, dead in enumerate(("w1", "w0", "w1"), 1):
        for _ in range(10):
            await client.complete()

        async def told(expected: float = before + 10 * number) -> bool:
            return requests(await counts(client)) == expected

        await until(told)
        pid = pids(up)[dead]
        served = up.output.count(f"worker {dead}: serving")
        os.kill(pid, signal.SIGKILL)
        await reachable(client)
        assert requests(await counts(client)) == before + 10 * number
        await until(lambda dead=dead, served=served: up.output.count(f"worker {dead}: serving") > served)
        await split_by_all(client)
        before = requests(await counts(client)) - 10 * number


async def split_by_all(client: Client, workers: int = 2) -> None:
    """Wait until Envoy asks all workers: each of some requests in a row has a P."""

    async def asked() -> bool:
        answers = [await client.complete() for _ in range(6)]
        split = all("x-pd-prefill" in each.headers for each in answers)
        return split and len(await deciders(client, 6)) == workers

    await until(asked)


async def test_one_that_hangs_holds_up_no_operator(client: Client, up: Process) -> None:
    for _ in range(4):
        await client.complete()
    before = await counts(client)
    pid = pids(up)["w1"]
    os.kill(pid, signal.SIGSTOP)
    try:
        found = await counts(client)
        assert requests(found) >= requests(before)
        assert (await client.admin("GET", "/decisions"))[0] == 200
        assert (await client.admin("GET", "/status"))[0] == 200
        async with load(client, clients=2) as seen:
            await seen.more()
        seen.assert_clean()
    finally:
        with contextlib.suppress(ProcessLookupError):  # it is ended if that took long
            os.kill(pid, signal.SIGCONT)
    await split_by_all(client)


async def test_the_first_that_hangs_is_ended_and_another_answers_operators(
    client: Client, up: Process
) -> None:
    await client.complete()
    pid = pids(up)["w0"]
    os.kill(pid, signal.SIGSTOP)
    async with load(client, clients=2) as seen:
        await until(lambda: pids(up).get("w0", pid) != pid)
        await reachable(client)
        await seen.more()
    seen.assert_clean()
    await started_again(up, "w0", pid)
    await split_by_all(client)
    assert f"worker w0 (process {pid}) hangs: it is ended" in up.output


async def test_what_an_operator_changes_counts_at_all_and_outlives_the_first(
    client: Client, up: Process, tmp_path: Path
) -> None:
    changed = {"strategy": "least_load"}
    assert (await client.admin("PUT", "/strategy", changed))[0] == 200
    assert (await client.admin("POST", "/instances/decode-0/drain"))[0] == 202
    await all_use(client, "least_load")
    pid = pids(up)["w0"]
    os.kill(pid, signal.SIGKILL)
    await reachable(client)
    assert (await client.admin("GET", "/strategy"))[1]["strategy"] == "least_load"
    await started_again(up, "w0", pid)
    await split_by_all(client)
    await all_use(client, "least_load")
    for _ in range(10):
        assert (await client.complete()).headers["x-pd-decode"] == "decode-1"
    assert (await client.admin("POST", "/instances/decode-0/undrain"))[0] == 200

    def kept() -> bool:
        state = json.loads((tmp_path / "state.json").read_text())
        return bool(state["strategy"] == "least_load" and not state["drained"])

    await until(kept)
    assert "corrupt" not in up.output


async def all_use(client: Client, strategy: str) -> None:
    """Wait until both workers have chosen by a strategy."""

    async def both() -> bool:
        for _ in range(4):
            await client.complete()
        _, found = await client.admin("GET", "/decisions?limit=4")
        used = {(each["id"].partition(".")[0], each["decode"]["strategy"]) for each in found["decisions"]}
        return used == {(worker, strategy) for worker in WORKERS}

    await until(both)


async def test_what_one_has_had_cached_another_knows(client: Client) -> None:
    """The first choice that a worker makes for a prompt already knows where another has sent it."""
    assert (await client.admin("PUT", "/strategy", {"strategy": "prefix_cache"}))[0] == 200
    await all_use(client, "prefix_cache")
    numbers = count()

    async def known() -> bool:
        """Of a new prompt, since they tell each other a moment later: a busy machine is too slow for some."""
        prompt = f"Prompt {next(numbers)} is long. " * 200
        where = (await client.complete(prompt=prompt)).headers["x-pd-prefill"]
        by = first = (await chosen_by(client))[0]
        while by == first:
            await client.complete(prompt=prompt)
            by, choice = await chosen_by(client)
        (picked, *_) = choice["candidates"]
        return picked["id"] == where and picked["terms"]["cached_blocks"] > 0

    await until(known)


async def chosen_by(client: Client) -> tuple[str, Any]:
    """Which worker has made the last decision, and what it has chosen for prefill."""
    _, found = await client.admin("GET", "/decisions?limit=1")
    (decision,) = found["decisions"]
    return decision["id"].partition(".")[0], decision["prefill"]


async def test_sighup_and_reload_reach_all(
    client: Client, up: Process, stack: Stack, settings: dict[str, Any]
) -> None:
    up.signal(signal.SIGHUP)
    said = "INFO {} vllm_pd_scheduler.records.events: the configuration was read again: nothing has changed"
    await until(lambda: all(said.format(worker) in up.output for worker in WORKERS))
    stack.write_config({**settings, "prefill_timeout": 55.5})
    assert (await client.admin("POST", "/reload"))[0] == 200
    said = (
        "INFO {} vllm_pd_scheduler.records.events: the configuration was read again: prefill_timeout changed"
    )
    await until(lambda: all(said.format(worker) in up.output for worker in WORKERS))
    said = "INFO {} vllm_pd_scheduler.records.events: log level is DEBUG"

    async def all_write_more() -> bool:
        """One that does not answer the first one in time has not heard it."""
        assert (await client.admin("PUT", "/log-level", {"level": "DEBUG"}))[0] == 200
        return all(said.format(worker) in up.output for worker in WORKERS)

    await until(all_write_more)


async def test_one_that_is_started_again_is_where_envoy_knows_it(
    client: Client, up: Process, stack: Stack, settings: dict[str, Any]
) -> None:
    stack.write_config({**settings, "grpc_socket": "/tmp/elsewhere.sock", "strategy": "least_load"})
    for number, broken in enumerate((False, True), 1):
        if broken:
            stack.write_config({**settings, "nonsense": 1})
        pid = pids(up)["w1"]
        os.kill(pid, signal.SIGKILL)
        await until(lambda number=number: up.output.count("worker w1: serving") > number)
        await split_by_all(client)
    await up.says("ERROR w1 vllm_pd_scheduler.cli.serving: the configuration is as at the start")


async def test_events_and_the_trace_are_of_all(client: Client) -> None:
    _, found = await client.admin("GET", "/events")
    started = [each["text"] for each in found["events"] if each["kind"] == "started"]
    assert sorted(text.partition(":")[0] for text in started) == ["worker w0", "worker w1"]
    headers = {"accept": "text/event-stream"}
    lines: list[dict[str, Any]] = []

    async def read(answer: aiohttp.ClientResponse) -> None:
        async for line in answer.content:
            if line.startswith(b"data: "):
                lines.append(json.loads(line[6:]))

    async with client.session.get(f"{client.stack.admin}/trace", headers=headers) as answer:
        reading = asyncio.ensure_future(read(answer))

        async def recorded() -> bool:
            for _ in range(4):
                await client.complete()
            return len(lines) >= 20

        await until(recorded)
        reading.cancel()
    _, found = await client.admin("GET", "/history")
    assert found["interval_s"] > 0


async def test_sigterm_drains_all(session: aiohttp.ClientSession, stack: Stack, tmp_path: Path) -> None:
    with (
        Fleet(1, 1) as fleet,
        spawned([*stack.up({**PATIENT, **fleet.config()}), "--workers=2"]) as process,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        await split_by_all(client)
        children = process.children()
        async with contextlib.AsyncExitStack() as held:
            streams = [await held.enter_async_context(client.held_stream()) for _ in range(4)]
            process.signal(signal.SIGTERM)
            await until(lambda: process.output.count("requests in flight") == 2)
            for stream in streams:
                assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.to_thread(process.wait) == 0
        assert not any(map(running, children))
        assert "Traceback" not in process.output


async def test_one_without_requests_stays_in_a_drain_as_long_as_another_has_some(
    session: aiohttp.ClientSession, stack: Stack
) -> None:
    body = {"prompt": "p", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with (
        Fleet(1, 2, arguments=["--decode-base=0.02"]) as fleet,
        spawned([*stack.up({**PATIENT, **fleet.config()}), "--workers=2"]) as process,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        await split_by_all(client)
        async with session.post(stack.url + "/v1/completions", json=body) as answer:
            await answer.content.readline()
            process.signal(signal.SIGTERM)
            await until(lambda: process.output.count("requests in flight") == 2)
            answers = [await client.complete() for _ in range(8)]
            assert len(pids(process)) == 2
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert all("x-pd-prefill" in each.headers for each in answers)
        assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in process.output


async def test_a_second_signal_ends_the_drain(session: aiohttp.ClientSession, stack: Stack) -> None:
    with (
        Fleet(1, 1) as fleet,
        spawned([*stack.up({**PATIENT, **fleet.config(), "drain_timeout": 600}), "--workers=2"]) as process,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        async with client.held_stream():
            process.signal(signal.SIGTERM)
            await until(lambda: process.output.count("requests in flight") == 2)
            process.signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait) == 0


async def test_when_the_parent_is_killed_all_end(client: Client, up: Process) -> None:
    children = up.children()
    assert len(children) == 3, "two workers and an Envoy"
    up.signal(signal.SIGKILL)
    await until(lambda: not any(map(running, children)))


async def test_one_that_cannot_start_says_why_once(stack: Stack, settings: dict[str, Any]) -> None:
    command = stack.serve(settings)
    with (
        socket.create_server(("127.0.0.1", stack.admin_port)),
        spawned([*command[:3], "serve", *command[3:], "--workers=2"]) as process,
    ):
        assert await asyncio.to_thread(process.wait) == 1
        assert process.output.count("admin_port: cannot listen") == 1, process.output
        assert "Traceback" not in process.output


async def test_ports_that_cannot_be_are_refused(stack: Stack, settings: dict[str, Any]) -> None:
    grpc = stack.ports.grpc
    for other, said in (
        ({"metrics_port": grpc + 1}, f"grpc_port of worker w1: 127.0.0.1:{grpc + 1} is where metrics_port"),
        ({"metaserver_port": 65535}, "metaserver_port of worker w1 would be 65536"),
    ):
        command = stack.serve({**settings, **other})
        with spawned([*command[:3], "serve", *command[3:], "--workers=2"]) as process:
            assert await asyncio.to_thread(process.wait) == 1
            assert said in process.output


async def test_workers_beside_an_envoy_that_runs_elsewhere(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any]
) -> None:
    """Each listens at a port of its own, from grpc_port on; ``envoy-config`` has them all."""
    command = stack.serve(settings)
    config, ports = command[-1], stack.ports
    options = [f"--port={ports.ingress}", f"--envoy-admin-port={ports.admin}", "--workers=3"]
    made = [sys.executable, "-m", "vllm_pd_scheduler", "envoy-config", "--config", config, *options]
    with spawned(made) as printing:
        assert await asyncio.to_thread(printing.wait) == 0
        path = stack.directory / "workers.yaml"
        path.write_text(printing.output)
    envoy = [find_envoy(), "-c", str(path), "--log-level", "warning", "--disable-hot-restart"]
    with (
        spawned([*command[:3], "serve", *command[3:], "--workers=3"]) as process,
        spawned(envoy) as beside,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        await split_by_all(client, 3)
        assert "lua" not in beside.output
