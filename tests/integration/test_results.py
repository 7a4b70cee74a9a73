"""What Envoy writes into the log of results, entry by entry: no prompt, no key, no hand-off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Client, Stack
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.envoy import access_log
from vllm_pd_scheduler.envoy.process import EnvoyProcess
from vllm_pd_scheduler.service.app import App
from vllm_pd_scheduler.sim.profile import EngineProfile

PROMPT = "A prompt that nobody else may read. " * 400
KEY = "Bearer sk-nobody-else-may-have-it"
SLOW = replace(EngineProfile.instant(), decode_base=0.05)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 2, profile=SLOW, arguments=["--max-model-len=16384"]) as running:
        yield running


@pytest_asyncio.fixture
async def entries(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Client, list[Any]]]:
    """A client of a scheduler in this process, and the entries that its Envoy has written."""
    found: list[Any] = []
    read = access_log.read_result

    def noted(entry: Any) -> Any:
        copy = type(entry)()
        copy.CopyFrom(entry)
        found.append(copy)
        return read(entry)

    monkeypatch.setattr(access_log, "read_result", noted)
    stack = Stack(tmp_path)
    config = {**NO_EJECTION, **fleet.config(), "grpc_port": stack.ports.grpc, "admin_port": stack.admin_port}
    async with (
        App(parse_config({**config, "health_check_interval": 0.2})),
        EnvoyProcess(stack.ports, access_log=False),
        aiohttp.ClientSession() as session,
    ):
        client = Client(session, stack, fleet)
        await client.until_known()
        await client.until_split()
        yield client, found


async def entry_of(entries: list[Any], request_id: str) -> Any:
    async def written() -> bool:
        return any(each.request.request_id == request_id for each in entries)

    await until(written)
    (entry,) = [each for each in entries if each.request.request_id == request_id]
    return entry


def handoff_of(entry: Any) -> dict[str, Any]:
    return dict(entry.common_properties.metadata.filter_metadata["vllm_pd"])


async def test_an_entry_has_no_prompt_no_key_and_no_handoff(entries: tuple[Client, list[Any]]) -> None:
    client, found = entries
    answer = await client.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4}, {"authorization": KEY})
    assert answer.status == 200
    assert (await client.request_of(answer))["hand_off"] == "receive"
    entry = await entry_of(found, answer.headers["x-request-id"])
    assert handoff_of(entry)["text"] == ""
    written = str(entry)
    for secret in ("nobody else may read", "sk-nobody", "remote_block_ids", "remote_engine_id"):
        assert secret not in written
    assert entry.ByteSize() < 4096


async def test_a_further_attempt_has_no_handoff_and_none_is_written(
    entries: tuple[Client, list[Any]],
) -> None:
    client, found = entries
    for name in ("decode-0", "decode-1"):
        await client.fault(name, status=503, times=1)
    answer = await client.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})
    await asyncio.gather(*(client.fault(name) for name in ("decode-0", "decode-1")))
    assert "x-pd-prefill" not in answer.headers
    assert answer.status in (200, 503)  # both D may have answered 503
    entry = await entry_of(found, answer.headers["x-request-id"])
    assert handoff_of(entry)["text"] == ""
    sent = [each for name in ("decode-0", "decode-1") for each in await client.seen(name)]
    ours = [each for each in sent if answer.headers["x-request-id"] in json.dumps(each["headers"])]
    assert [each["hand_off"] for each in ours].count("receive") <= 1
    assert ours[-1]["hand_off"] is None or len(ours) == 1
