"""Why a request went where it went, and what became of it, as Envoy tells it: with a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from tests.support.processes import NO_EJECTION, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

EXPLAIN = {"x-pd-explain": "1"}
LATE_S = 0.4
"""Seconds that a simulated hand-off takes: the first token comes so long after the headers."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    profile = replace(EngineProfile.instant(), transfer_latency=LATE_S)
    with Fleet(2, 2, profile=profile, arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack) -> Iterator[Process]:
    config = {"strategy": "predicted_latency", "prefill_strategy": "least_load", **NO_EJECTION}
    with spawned(stack.up({**config, **fleet.config()})) as process:
        yield process


async def decision(client: Client, request_id: str) -> dict[str, Any]:
    """Return what is known of a request, once Envoy has told of its end."""
    found: dict[str, Any] = {}

    async def told() -> bool:
        status, answer = await client.admin("GET", f"/decisions?request_id={request_id}")
        assert status == 200, answer
        (one,) = answer["decisions"]
        found.update(one)
        return one["outcome"] is not None

    await until(told)
    return found


async def metric(client: Client, name: str) -> float:
    """Return the sum over the series of a metric whose lines begin so."""
    _, text = await client.admin("GET", "/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def test_a_split_request(client: Client) -> None:
    await client.until_split()
    body = {"prompt": "Why?", "max_tokens": 8, "stream": True}
    answer = await client.post("/v1/completions", body, EXPLAIN)
    prefill, decode = answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]
    found = await decision(client, answer.headers["x-request-id"])
    assert (found["served"], found["status"], found["outcome"]) == ("split", 200, "ok")
    assert (found["prefill"]["picked"], found["decode"]["picked"]) == (prefill, decode)
    assert found["prefill"]["attempts"] == [{"instance": prefill, "outcome": "ok"}]
    assert found["decode"]["attempts"] == [{"instance": decode, "outcome": "ok"}]
    assert (found["prefill"]["strategy"], found["decode"]["strategy"]) == ("least_load", "predicted_latency")
    assert len(found["decode"]["candidates"]) == 2
    assert found["decode"]["candidates"][0]["terms"]["step"] > 0
    assert 0 < found["ttft_s"] <= found["duration_s"]
    assert found["predicted_ttft_s"] > 0
    line = answer.headers["x-pd-decision"]
    assert line.startswith(f"served=split, prefill={prefill} score=0.0/0.0 of 2, decode={decode} score=")


async def test_who_does_not_ask_is_told_nothing_and_no_instance_is(client: Client) -> None:
    silent = await client.post("/v1/completions", {"prompt": "Why?"}, {"x-pd-decision": "mine"})
    asking = await client.post("/v1/completions", {"prompt": "Why?"}, EXPLAIN)
    passed = await client.send("GET", "/v1/models", headers=EXPLAIN)
    assert "x-pd-decision" not in silent.headers
    assert passed.headers["x-pd-decision"].startswith("served=passed, decode=decode-")
    for answer in (silent, asking):
        sent = dict((await client.request_of(answer))["headers"])
        assert "x-pd-explain" not in sent
        assert sent.get("x-pd-decision") == answer.headers.get("x-pd-decision")


async def test_a_refused_request(client: Client) -> None:
    answer = await client.post("/v1/completions", b"{", EXPLAIN)
    found = await decision(client, answer.headers["x-request-id"])
    assert answer.status == found["status"] == 400
    assert (found["served"], found["reason"], found["outcome"]) == ("rejected", "bad_body", "rejected")
    assert answer.headers["x-pd-decision"] == "served=rejected, reason=bad_body"


async def test_a_stream_whose_first_token_is_late(client: Client) -> None:
    """Its headers come before that, at once: the time to the first token is not theirs."""
    body = {"prompt": "A late one", "max_tokens": 4, "stream": True}
    async with client.session.post(client.stack.url + "/v1/completions", json=body) as response:
        await response.read()
    found = await decision(client, response.headers["x-request-id"])
    assert (found["served"], found["stream"], found["outcome"]) == ("split", True, "ok")
    assert LATE_S <= found["ttft_s"] <= found["duration_s"]
    assert await metric(client, "pd_scheduler_handoff_duration_seconds_sum") >= LATE_S


async def test_a_client_that_leaves_before_the_first_token(client: Client) -> None:
    for name in ("decode-0", "decode-1"):
        await client.fault(name, mute=0)
    body = {"prompt": "Nobody waits", "max_tokens": 4, "stream": True}
    async with client.session.post(client.stack.url + "/v1/completions", json=body) as response:
        number = response.headers["x-request-id"]
    found = await decision(client, number)
    assert (found["status"], found["outcome"], found["ttft_s"]) == (200, "left", None)


async def test_a_retry_at_decode(client: Client) -> None:
    before = await metric(client, "pd_scheduler_handoff_duration_seconds_count")
    await client.fault("decode-0", status=503, times=1)
    await client.fault("decode-1", status=503, times=1)
    answers = [await client.complete(stream=True) for _ in range(4)]
    assert {answer.status for answer in answers} == {200}
    found = [await decision(client, answer.headers["x-request-id"]) for answer in answers]
    attempts = [[each["outcome"] for each in one["decode"]["attempts"]] for one in found]
    assert any(each[0] == "overloaded" and each[-1] == "ok" for each in attempts), attempts
    assert all(one["outcome"] == "ok" for one in found)
    retried = sum(len(each) > 1 for each in attempts)
    counted = await metric(client, "pd_scheduler_handoff_duration_seconds_count")
    assert counted - before == len(answers) - retried


async def test_a_stream_that_is_cut(client: Client) -> None:
    for name in ("decode-0", "decode-1"):
        await client.fault(name, half=True)
    body = {"prompt": "Half of it", "max_tokens": 16, "stream": True}
    async with client.session.post(client.stack.url + "/v1/completions", json=body) as response:
        number = response.headers["x-request-id"]
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    found = await decision(client, number)
    assert (found["outcome"], found["decode"]["attempts"][-1]["outcome"]) == ("cut", "cut")


async def test_an_error_of_the_clients(client: Client) -> None:
    answer = await client.complete(max_tokens="abc")
    found = await decision(client, answer.headers["x-request-id"])
    assert (found["status"], found["outcome"]) == (answer.status, "client_error")


async def test_metrics_count_each_once(client: Client) -> None:
    name = 'pd_scheduler_responses_total{outcome="ok"}'
    first_token = "pd_scheduler_time_to_first_token_seconds_count"
    before, first_tokens = await metric(client, name), await metric(client, first_token)
    answers = await asyncio.gather(*(client.complete(stream=True) for _ in range(50)))
    assert {answer.status for answer in answers} == {200}

    async def counted() -> bool:
        return await metric(client, name) == before + 50

    await until(counted)
    assert await metric(client, first_token) == first_tokens + 50


async def test_the_traffic_as_a_trace(client: Client) -> None:
    await client.until_split()
    shared = "The same beginning. " * 300
    async with client.session.get(
        f"{client.stack.admin}/trace", headers={"accept": "text/event-stream"}
    ) as stream:
        await stream.content.readline()
        for number in range(2):
            body = {"prompt": f"{shared}{number}", "max_tokens": 8}
            assert (await client.post("/v1/completions", body)).status == 200
        lines: list[dict[str, Any]] = []
        async for line in stream.content:
            if line.startswith(b"data:"):
                lines.append(json.loads(line[5:]))
            if len(lines) == 2:
                break
    first, second = lines
    assert abs(first["input_length"] - second["input_length"]) <= 1
    assert first["hash_ids"][0] == second["hash_ids"][0]
    assert len(first["hash_ids"]) == first["input_length"] // 512 > 0
    assert first["output_length"] >= 1
    assert set(first) == {"timestamp", "input_length", "output_length", "hash_ids"}
