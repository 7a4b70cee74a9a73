"""What holds where D pulls by NIXL holds where P pushes: the same tests, named and found out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.test_path import (
    test_a_client_that_leaves_during_prefill_cancels_it,
    test_a_clients_hand_off_never_gets_through,
    test_a_hand_off_that_decode_had_not_begun_with_is_freed,
    test_the_text_is_that_of_one_instance,
    test_what_a_prefill_leaves_whose_client_has_left_is_freed,
)
from tests.integration.test_rescue import test_another_decode_instance_answers
from tests.support.processes import NO_EJECTION, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile

__all__ = [
    "test_a_client_that_leaves_during_prefill_cancels_it",
    "test_a_clients_hand_off_never_gets_through",
    "test_a_hand_off_that_decode_had_not_begun_with_is_freed",
    "test_another_decode_instance_answers",
    "test_the_text_is_that_of_one_instance",
    "test_what_a_prefill_leaves_whose_client_has_left_is_freed",
]


@pytest.fixture(scope="module", params=["nixl-push", "auto"])
def connector(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    arguments = ["--max-model-len=4096", "--kv-connector=nixl-push"]
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=arguments) as running:
        yield running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, connector: str) -> Stack:
    return Stack(tmp_path_factory.mktemp("stack"))


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack, connector: str) -> Iterator[Process]:
    config = {"strategy": "round_robin", "connector": connector, **NO_EJECTION, **fleet.config()}
    with spawned(stack.up(config)) as process:
        yield process


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_requests_that_have_one_id_get_their_own_text(client: Client, stream: bool) -> None:
    """And their id back, whatever D was told."""
    ids, body = {"x-request-id": "one-for-all"}, {"max_tokens": 9, "stream": stream}
    prompts = [f"Number {number} of those with one id. " * 9 for number in range(4)]
    alone = [
        await client.session.post(
            client.fleet.decode[0].url + "/v1/completions", json={**body, "stream": False, "prompt": each}
        )
        for each in prompts
    ]
    expected = [(await each.json())["choices"][0]["text"] for each in alone]
    for prompt, text in zip(prompts, expected, strict=True):
        answer = await client.post("/v1/completions", {**body, "prompt": prompt}, ids)
        assert answer.text == text
        assert "x-pd-prefill" in answer.headers
        assert answer.headers["x-request-id"] == "one-for-all"
        at_d = await client.request_of(answer)
        at_p = (await client.seen(answer.headers["x-pd-prefill"]))[-1]
        told = [{key.lower(): value for key, value in each["headers"].items()} for each in (at_p, at_d)]
        assert told[0]["x-request-id"] == told[1]["x-request-id"] != "one-for-all"
    await client.until_freed()


async def test_envoys_log_has_the_clients_id(client: Client, up: Process) -> None:
    await client.post("/v1/completions", {"prompt": "p", "max_tokens": 2}, {"x-request-id": "of-a-client"})
    for method, path in (
        ("GET", "/nowhere"),
        ("GET", "/health"),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
    ):
        answer = await client.send(
            method, path, b"{" if method == "POST" else None, {"x-request-id": "of-another"}
        )
        assert answer.headers["x-request-id"] == "of-another", path
