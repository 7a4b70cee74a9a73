"""A fleet with llm-d's sidecars behind a real Envoy: the scheduler names P, and calls none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import Client, Process, Stack, ready, spawned, unused_ports
from tests.support.sidecar import PREFILLER, Sidecar, config_with, sidecars
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

PROMPT = {"prompt": "Where is the cache?", "max_tokens": 8}


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


@dataclass
class Running:
    client: Client
    process: Process
    beside: dict[str, Sidecar]

    @property
    def asked(self) -> list[str | None]:
        """The P of all requests."""
        return [prefill for sidecar in self.beside.values() for prefill in sidecar.asked]

    async def address(self, instance_id: str) -> str:
        instance = self.client.fleet[instance_id]
        return instance.url.removeprefix("http://")

    async def settled(self) -> None:
        await self.client.until_in_flight(0)


@pytest.fixture
async def running(session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path) -> AsyncIterator[Running]:
    stack = Stack(tmp_path)
    async with sidecars(fleet) as beside:
        # Requests alone find an instance that fails, since no probe comes after the first.
        config = {"strategy": "round_robin", "health_check_interval": 3600.0, **config_with(fleet, beside)}
        with spawned(stack.up(config)) as process:
            client = Client(session, stack, fleet)
            await ready(client, process)
            await client.until_split()
            for sidecar in beside.values():
                sidecar.asked.clear()
                sidecar.bodies.clear()
            yield Running(client, process, beside)
            assert "Traceback" not in process.output


async def test_p_prefills_and_d_answers(running: Running, fleet: Fleet) -> None:
    client = running.client
    expected = (await client.session.post(fleet.decode[0].url + "/v1/completions", json=PROMPT)).json
    text = (await expected())["choices"][0]["text"]
    for stream in (False, True):
        for _ in range(4):
            answer = await client.complete(**PROMPT, stream=stream)
            assert answer.text == text
            prefill = fleet[answer.headers["x-pd-prefill"]]
            assert answer.headers["x-pd-decode"] in running.beside
            assert prefill.url.endswith(str(running.beside[answer.headers["x-pd-decode"]].asked[-1]))
    assert {len(sidecar.asked) for sidecar in running.beside.values()} == {4}
    assert len(set(running.asked)) == 2, "both P"
    for sidecar in running.beside.values():
        assert all(json.loads(body).get("kv_transfer_params") is None for body in sidecar.bodies)
    for each in fleet.decode:
        found = await client.json(each.url + "/_sim/stats")
        assert set(found["hand_offs"]) == {"good"}
        assert found["hand_offs"]["good"] >= 4
    await running.settled()
    await client.until_freed()


async def test_what_is_not_split_names_no_p(running: Running) -> None:
    client = running.client
    assert (await client.complete(n=2)).status == 200
    assert (await client.post("/v1/embeddings", {"input": "x"})).status == 200
    assert (await client.send("GET", "/v1/models")).status == 200
    assert running.asked == [None]


async def test_a_client_steers_no_sidecar(running: Running) -> None:
    """Neither past the scheduler nor while it is away: a sidecar would send the prompt wherever it says."""
    (trap,) = unused_ports(1)
    caught: list[bytes] = []

    async def catch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caught.append(await reader.read(1))
        writer.close()

    headers = {PREFILLER: f"127.0.0.1:{trap}", PREFILLER.upper(): f"127.0.0.1:{trap}"}
    async with await asyncio.start_server(catch, "127.0.0.1", trap):
        client = running.client
        for body in (PROMPT, {**PROMPT, "n": 2}):
            answer = await client.post("/v1/completions", body, headers)
            assert answer.status == 200
        assert f"127.0.0.1:{trap}" not in running.asked
        running.process.process.send_signal(19)  # SIGSTOP: Envoy passes it by
        try:
            for _ in range(3):
                assert (await client.post("/v1/completions", PROMPT, headers)).status == 200
        finally:
            running.process.process.send_signal(18)
        assert f"127.0.0.1:{trap}" not in running.asked
        assert None in running.asked[-3:], "without the scheduler nobody is named"
    assert caught == []


async def test_a_p_that_dies_is_no_error(running: Running, fleet: Fleet) -> None:
    """Its sidecar answers 502, and Envoy's next attempt, at another D, names no P."""
    client = running.client
    fleet.kill("prefill-0")
    for _ in range(6):
        answer = await client.complete(**PROMPT)
        assert answer.status == 200, answer
    assert None in running.asked

    async def left_out() -> bool:
        assert (await client.complete(**PROMPT)).status == 200
        states = await client.states()
        assert all(states[name] == "healthy" for name in running.beside), "no D is at fault"
        return states["prefill-0"] != "healthy"

    await until(left_out)
    await running.settled()


async def test_a_p_that_fails_is_ejected_and_no_d(running: Running, fleet: Fleet) -> None:
    client = running.client
    await client.fault("prefill-0", status=500)

    async def ejected() -> bool:
        assert (await client.complete(**PROMPT)).status == 200
        states = await client.states()
        assert all(states[name] == "healthy" for name in running.beside), "no D is at fault"
        return states["prefill-0"] != "healthy"

    await until(ejected)
    assert "prefill or decode: status" in (await client.instance("prefill-0"))["reason"]
    await client.fault("prefill-0")
    await running.settled()


async def test_p_is_free_while_d_writes(running: Running, fleet: Fleet) -> None:
    """Its part is over when it should be by prediction; what D may still fetch keeps it from draining."""
    client = running.client
    for each in fleet.decode:
        await client.fault(each.id, mute=2)

    async def loads() -> dict[str, int]:
        _, found = await client.admin("GET", "/instances")
        return {each["id"]: each["in_flight"] for each in found["instances"] if each["in_flight"]}

    url, body = client.stack.url + "/v1/completions", {**PROMPT, "stream": True}
    async with client.session.post(url, json=body) as answer:
        assert answer.status == 200
        prefill, decode = answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]
        await answer.content.readany()

        async def only_d() -> bool:
            return await loads() == {decode: 1}

        await until(only_d)
        await client.admin("POST", f"/instances/{prefill}/drain")
        assert (await client.instance(prefill))["state"] == "draining"
        assert not (await client.instance(prefill))["drained"]
    await running.settled()


async def test_the_leg_changes_while_it_runs(running: Running, fleet: Fleet) -> None:
    client = running.client
    path = client.stack.directory / "scheduler_config.json"
    config = json.loads(path.read_text())
    seen = await client.seen_by_all()
    for leg, named in (("scheduler", False), ("sidecar", True)):
        path.write_text(json.dumps({**config, "prefill_leg": leg}))
        status, told = await client.admin("POST", "/reload")
        assert (status, told["changed"]) in ((200, ["prefill_leg"]), (200, [])), told
        running.beside["decode-0"].asked.clear()
        running.beside["decode-1"].asked.clear()
        for _ in range(2):
            answer = await client.complete(**PROMPT)
            assert "x-pd-prefill" in answer.headers
        assert [each is not None for each in running.asked] == [named] * 2
    assert await client.seen_by_all() != seen
