"""KV events of simulated engines: what the scheduler takes for cached follows what the engines have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.observed_index import cached_blocks
from tests.support.processes import Client, Stack, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.envoy.process import EnvoyProcess
from vllm_pd_scheduler.service.app import App

SMALL = ["--instant", "--num-blocks=256", "--block-size=16", "--max-model-len=2048"]
CHAT = {
    "model": "sim-model",
    "messages": [{"role": "user", "content": "What does the cache hold? " * 200}],
    "max_tokens": 2,
}
COMPLETION = {"model": "sim-model", "prompt": "What does the cache hold? " * 200, "max_tokens": 2}


def path_of(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


@dataclass
class Observed:
    """A scheduler in this process, with its Envoy and its fleet."""

    app: App
    client: Client
    fleet: Fleet

    async def ask(self, chat: dict[str, Any] = CHAT) -> None:
        answer = await self.client.post(path_of(chat), chat)
        assert answer.status == 200
        assert "x-pd-prefill" in answer.headers

    async def ask_past_us(self, instance_id: str, chat: dict[str, Any]) -> None:
        """Send an instance a request past the scheduler, as another router does."""
        url = self.fleet[instance_id].url + path_of(chat)
        async with self.client.session.post(url, json={**chat, "max_tokens": 1}) as response:
            assert response.status == 200, await response.text()

    async def until_heard(self, instance_id: str) -> None:
        """Wait until events of an engine arrive: those from before are lost, if it replays none."""
        numbers = count(1000)

        async def heard() -> bool:
            await self.ask_past_us(instance_id, other(next(numbers)))
            _, text = await self.client.admin("GET", "/metrics")
            return f'kv_event_batches_total{{endpoint="{instance_id}",outcome="read"}}' in text

        await until(heard)

    def cached(self, instance_id: str, chat: dict[str, Any] = CHAT) -> int:
        """Return how many blocks of a prompt are taken for cached."""
        return cached_blocks(self.app.router, instance_id, chat)


@pytest_asyncio.fixture
async def observed(tmp_path: Path) -> AsyncIterator[Observed]:
    ports, stack = unused_ports(4), Stack(tmp_path)
    publishes = [f"--kv-events-port={ports[0]}", f"--kv-events-replay-port={ports[1]}"]
    decode = [f"--kv-events-port={ports[2]}"]
    with Fleet(1, 1, arguments=SMALL, prefill_arguments=publishes, decode_arguments=decode) as fleet:
        config = {
            **fleet.config(),
            "strategy": "predicted_latency",
            "kv_events": {"port": ports[0], "replay_port": ports[1]},
            "grpc_port": stack.ports.grpc,
            "admin_port": stack.admin_port,
        }
        config["decode_instances"][0] |= {"kv_events_port": ports[2], "kv_events_replay_port": ports[3]}
        async with (
            App(parse_config(config)) as app,
            EnvoyProcess(stack.ports, access_log=False),
            aiohttp.ClientSession() as session,
        ):
            found = Observed(app, Client(session, stack, fleet), fleet)
            await found.client.until_known()
            await found.client.until_split()
            await found.until_heard("decode-0")
            yield found


def other(number: int) -> dict[str, Any]:
    content = f"Prompt {number} of somebody else. " * 200
    return {**CHAT, "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("ours", [CHAT, COMPLETION], ids=["chat", "completion"])
@pytest.mark.parametrize("instance_id", ["prefill-0", "decode-0"])
async def test_what_others_evict_and_cache(
    observed: Observed, instance_id: str, ours: dict[str, Any]
) -> None:
    await observed.ask(ours)
    await observed.ask(ours)  # P has shown by the first that it tells token ids
    known = observed.cached(instance_id, ours)
    assert known >= 3
    for number in range(6):
        await observed.ask_past_us(instance_id, other(number))
    await until(lambda: observed.cached(instance_id, ours) == 0)
    await observed.ask_past_us(instance_id, ours)
    await until(lambda: observed.cached(instance_id, ours) >= known - 1)


async def test_a_restarted_engine_has_nothing(observed: Observed) -> None:
    await observed.ask()
    await observed.ask()
    observed.fleet.kill("prefill-0")
    observed.fleet.restart("prefill-0")
    await observed.client.until_split()
    await until(lambda: observed.cached("prefill-0") == 0)


async def test_metrics(observed: Observed) -> None:
    await observed.ask()

    async def told() -> bool:
        _, text = await observed.client.admin("GET", "/metrics")
        return 'pd_scheduler_kv_event_batches_total{endpoint="prefill-0",outcome="read"}' in text

    await until(told)
