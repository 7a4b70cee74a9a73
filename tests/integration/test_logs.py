"""The log of a scheduler and its Envoy, as an operator's log collector reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

PROMPT = "a prompt that is nobody's business"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, profile=EngineProfile.instant()) as running:
        yield running


def objects(process: Process) -> list[dict[str, Any]]:
    """Each line of the log so far but those of Envoy's access log, which has its own form."""
    lines = [json.loads(line) for line in process.lines()]
    return [line for line in lines if "logger" in line]


def decisions(process: Process) -> list[dict[str, Any]]:
    return [line for line in objects(process) if line["logger"] == "vllm_pd_scheduler.routing.core"]


async def test_each_line_is_an_object_and_each_request_has_one_at_debug(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    stack = Stack(tmp_path)
    with spawned([*stack.up(fleet.config()), "--log-format=json"]) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        await client.until_split()
        assert decisions(process) == [], "the level is INFO"
        assert await client.admin("PUT", "/log-level", {"level": "DEBUG"}) == (200, {"level": "DEBUG"})
        sent = {"x-request-id": "id-of-the-client"}
        body = {"prompt": PROMPT, "max_tokens": 2, "user": "nobody"}
        answer = await client.post("/v1/completions", body, sent)
        assert answer.status == 200
        assert answer.headers["x-request-id"] == "id-of-the-client"

        def said() -> bool:
            return bool(decisions(process))

        await until(said)
        await client.admin("PUT", "/log-level", {"level": "INFO"})
        assert (await client.post("/v1/completions", body)).status == 200
        (line,) = decisions(process)
        assert (line["level"], line["request_id"]) == ("DEBUG", "id-of-the-client")
        assert line["message"].startswith("/v1/completions: split, P prefill-0, D decode-0; x-pd-id ")
        assert set(line) == {"time", "level", "logger", "message", "request_id"}
        assert PROMPT not in process.output


async def test_envoys_lines_are_objects_too(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    stack = Stack(tmp_path)
    config = {**fleet.config(), "log_format": "json"}
    with spawned([*stack.up(config), "--log-level=DEBUG"]) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        await client.until_split()
        loggers = {line["logger"].partition(".")[0] for line in objects(process)}
        assert {"envoy", "vllm_pd_scheduler"} <= loggers
