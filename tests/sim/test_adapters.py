"""LoRA adapters of a simulated instance, as vLLM has them."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.sim import BODY, COMPLETIONS, Client
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.health.vllm_metrics import parse_metrics
from vllm_pd_scheduler.sim.profile import EngineProfile

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    arguments = ["--enable-lora", "--max-loras=3", "--lora-modules", "first=/lora/1"]
    with Fleet(1, 1, profile=EngineProfile.instant(), arguments=arguments) as running:
        yield running


async def listed(client: Client, fleet: Fleet) -> dict[str, Any]:
    answer = await client.get(fleet["decode-0"], "/v1/models")
    return {card["id"]: card for card in answer["data"]}


async def test_load_list_use_unload(client: Client, fleet: Fleet) -> None:
    decode = fleet["decode-0"]
    before = await listed(client, fleet)
    assert list(before) == ["sim-model", "first"]
    assert (before["first"]["parent"], before["sim-model"]["parent"]) == ("sim-model", None)
    said = await client.post(decode, LOAD, {"lora_name": "second", "lora_path": "/lora/2"})
    assert said == "Success: LoRA adapter 'second' added successfully."
    assert list(await listed(client, fleet)) == ["sim-model", "first", "second"]
    answer = await client.post(decode, COMPLETIONS, {**BODY, "model": "second"})
    assert (client.status, answer["model"]) == (200, "second")
    await client.post(decode, UNLOAD, {"lora_name": "second"})
    assert client.status == 200
    answer = await client.post(decode, COMPLETIONS, {**BODY, "model": "second"})
    assert (client.status, answer["error"]["message"]) == (404, "The model `second` does not exist.")


async def test_an_adapter_has_another_cache_and_hands_over(client: Client, fleet: Fleet) -> None:
    body = {**BODY, "model": "first"}
    params = await client.prefill(fleet["prefill-0"], body)
    assert await client.text(fleet["decode-0"], body, params) == await client.text(fleet["decode-0"], body)
    again = await client.prefill(fleet["prefill-0"], {**body, "model": "sim-model"})
    assert again["remote_block_ids"] != params["remote_block_ids"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (LOAD, {"lora_name": "x"}, 400),
        (LOAD, {"lora_name": "first", "lora_path": "/x"}, 400),
        (LOAD, {"lora_name": 7, "lora_path": "/x"}, 400),
        (UNLOAD, {}, 400),
        (UNLOAD, {"lora_name": "x"}, 404),
    ],
)
async def test_refusals(client: Client, fleet: Fleet, path: str, body: Any, status: int) -> None:
    answer = await client.post(fleet["decode-0"], path, body)
    assert (client.status, answer["error"]["code"]) == (status, status)


async def test_the_metric(client: Client, fleet: Fleet) -> None:
    page = parse_metrics(await client.get(fleet["decode-0"], "/metrics"))
    assert (page.adapters, page.adapter_slots) == ((), 3)
