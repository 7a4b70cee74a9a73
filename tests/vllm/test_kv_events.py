"""KV events of real vLLM: what the scheduler takes for cached follows what the engines have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.observed_index import cached_blocks
from tests.support.processes import Stack
from tests.support.real_vllm import MODEL, Pair, post, ready
from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.envoy.process import EnvoyProcess
from vllm_pd_scheduler.service.app import App

pytestmark = pytest.mark.vllm


def path_of(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def chat(name: str, count: int = 42) -> dict[str, Any]:
    text = " ".join(f"{name} asks what the cache holds of part {number}." for number in range(count))
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 2}


@dataclass
class Observed:
    """A scheduler in this process, with its Envoy in front of a real pair."""

    app: App
    stack: Stack
    pair: Pair

    async def ask(self, body: dict[str, Any]) -> None:
        answer = await post(self.stack.url, path_of(body), body)
        assert answer.status == 200, answer.text
        assert "x-pd-prefill" in answer.headers

    async def ask_past_us(self, name: str, body: dict[str, Any]) -> None:
        instance = self.pair.prefill if name == "p" else self.pair.decode
        assert (await post(instance.url, path_of(body), body)).status == 200

    def cached(self, name: str, body: dict[str, Any]) -> int:
        return cached_blocks(self.app.router, name, body)


@pytest_asyncio.fixture
async def observed(publishing: Pair, tmp_path: Path) -> AsyncIterator[Observed]:
    stack = Stack(tmp_path)
    ports = {"kv_events_port": 5687, "kv_events_replay_port": 5688}
    config = {
        "strategy": "predicted_latency",
        "prefill_instances": [publishing.prefill.entry("p")],
        "decode_instances": [publishing.decode.entry("d") | ports],
        "kv_events": {"port": 5677, "replay_port": 5678},
        "grpc_port": stack.ports.grpc,
        "admin_port": stack.admin_port,
    }
    async with App(parse_config(config)) as app, EnvoyProcess(stack.ports, access_log=False):
        await ready(stack)
        yield Observed(app, stack, publishing)


@pytest.mark.parametrize(("name", "kind"), [("p", "chat"), ("d", "chat"), ("p", "completion")])
async def test_what_others_evict_and_cache(observed: Observed, name: str, kind: str) -> None:
    ours = chat(f"Somebody of ours at {name}")
    if kind == "completion":
        ours["prompt"] = ours.pop("messages")[0]["content"]
    await observed.ask(ours)
    await observed.ask(ours)  # P has shown by the first that it tells token ids
    known = observed.cached(name, ours)
    assert known >= 2
    others = 0

    async def evicted() -> bool:
        nonlocal others
        others += 1
        await observed.ask_past_us(name, chat(f"Another {others} at {name}"))
        return observed.cached(name, ours) == 0

    await until(evicted)
    await observed.ask_past_us(name, ours)
    await until(lambda: observed.cached(name, ours) >= known - 1)
