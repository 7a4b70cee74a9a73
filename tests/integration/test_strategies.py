"""Strategies by role, changed while requests run, and a shadow that is compared and never followed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet

PROMPT = "Prefill reads the whole prompt, decode writes token after token. " * 40
"""Some blocks, so that there is a prefix to be remembered."""

BROKEN = """
from vllm_pd_scheduler.strategies import Strategy

class Broken(Strategy):
    reads_prefixes = True

    def rank(self, endpoints, request, count):
        raise RuntimeError("odd")
"""
ROUNDS = 6


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A scheduler whose shadow fails at every pick."""
    directory: Path = tmp_path_factory.mktemp("strategies")
    (directory / "broken_shadow.py").write_text(BROKEN)
    command = stack.up({"strategy": "round_robin", **NO_EJECTION, **fleet.config()})
    with spawned([*command, "--shadow=broken_shadow:Broken"], PYTHONPATH=_with(directory)) as process:
        yield process


def _with(directory: Path) -> str:
    return os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))


@pytest_asyncio.fixture
async def client(client: Client, up: Process) -> AsyncIterator[Client]:
    yield client
    assert "Traceback" not in up.output


async def served(client: Client, topic: str) -> dict[str, list[str]]:
    """Send the same prompt some times; return which instances served it."""
    answers = [await client.complete(prompt=topic + PROMPT) for _ in range(ROUNDS)]
    assert {answer.status for answer in answers} == {200}
    return {role: [a.headers[f"x-pd-{role}"] for a in answers] for role in ("prefill", "decode")}


async def shadow(client: Client) -> dict[str, Any]:
    status, found = await client.admin("GET", "/shadow")
    assert status == 200
    return dict(found)


async def test_a_shadow_that_fails_costs_no_request(client: Client, up: Process) -> None:
    found = await served(client, "one")
    assert (len(set(found["prefill"])), len(set(found["decode"]))) == (2, 2)
    report = await shadow(client)
    assert report["strategy"] == "broken_shadow:Broken"
    for role in ("prefill", "decode"):
        assert (report[role]["failed"], report[role]["agreed"], report[role]["differed"]) == (ROUNDS, 0, 0)
    await up.says("WARNING")
    (warning,) = (line for line in up.lines() if "WARNING" in line)
    assert (
        "shadow strategy broken_shadow:Broken failed to pick a prefill instance: RuntimeError: odd" in warning
    )


async def test_a_live_strategy_that_fails_costs_no_request_and_is_seen(client: Client, up: Process) -> None:
    failures = "ERROR vllm_pd_scheduler.telemetry.failures"  # not that a look at the file refuses the shadow
    before = up.output.count(failures)
    status, _ = await client.admin("PUT", "/strategy", {"strategy": "broken_shadow:Broken"})
    assert status == 200
    found = await served(client, "broken")
    assert (len(set(found["prefill"])), len(set(found["decode"]))) == (2, 2), (
        "split, and spread by least_load"
    )
    assert (await client.admin("GET", "/readyz"))[0] == 200
    status, page = await client.admin("GET", "/metrics")
    for role in ("prefill", "decode"):
        labels = f'{{role="{role}",strategy="broken_shadow:Broken"}}'
        assert f"pd_scheduler_strategy_failures_total{labels} {ROUNDS}.0" in page
    await up.says(failures, before + 2)
    errors = [line for line in up.lines() if failures in line][before:]
    assert len(errors) == 2, "once a minute for each role"
    assert "strategy broken_shadow:Broken failed for prefill: RuntimeError: odd, at " in errors[0]
    assert "broken_shadow.py:8 in rank" in errors[0]
    status, _ = await client.admin("PUT", "/strategy", {"strategy": "round_robin"})
    assert status == 200


async def test_a_strategy_of_one_role_counts_from_the_next_request_on(client: Client) -> None:
    await client.admin("DELETE", "/shadow")
    status, found = await client.admin("PUT", "/strategy", {"prefill_strategy": "prefix_cache"})
    assert (status, found["strategy"]) == (200, "prefix_cache/round_robin")
    used = await served(client, "two")
    assert len(set(used["prefill"])) == 1, "the prompt is remembered from the first request on"
    assert len(set(used["decode"])) == 2, "decode goes on in turns"
    status, _ = await client.admin("PUT", "/strategy", {"strategy": "round_robin"})
    assert len(set((await served(client, "two"))["prefill"])) == 2


async def test_a_shadow_tells_where_it_would_differ(client: Client) -> None:
    """The live strategy takes turns, the shadow would stay where the prompt is cached."""
    status, _ = await client.admin("PUT", "/shadow", {"strategy": "prefix_cache"})
    assert status == 200
    first = await served(client, "three")
    assert first["prefill"][::2] == [first["prefill"][0]] * (ROUNDS // 2), "turns are taken as before"
    assert first["prefill"][1::2] == [first["prefill"][1]] * (ROUNDS // 2)
    report = await shadow(client)
    for role in ("prefill", "decode"):
        assert report[role]["agreed"] + report[role]["differed"] == ROUNDS
        assert report[role]["failed"] == 0
        assert report[role]["live_predicted_seconds"] > 0
    kept = [each for each in report["differences"] if each["role"] == "prefill"]
    assert len(kept) == report["prefill"]["differed"]
    assert all(each["live"] != each["shadow"] for each in kept)
    assert "Prefill reads" not in str(report)
    status, page = await client.admin("GET", "/metrics")
    assert f'outcome="agreed",role="prefill",strategy="prefix_cache"}} {report["prefill"]["agreed"]}' in page
    assert (await client.admin("DELETE", "/shadow"))[0] == 204
    assert await shadow(client) == {"strategy": None}
