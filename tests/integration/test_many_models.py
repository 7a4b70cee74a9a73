"""A fleet of several models behind real Envoy: aliases, canaries, adapters, the list, the health of one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Answer, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

V1, V2, OLD = "chat-v1", "chat-v2", "old"
LENGTH = "--max-model-len=4096"
MODELS: dict[str, Any] = {
    "chat": {"targets": {V1: 80, V2: 20}},
    "latest": {"targets": {V2: 1}},
    "gone": {"targets": {"nobody-has-it": 1}},
    "half-gone": {"targets": {"nobody-has-it": 50, V1: 50}},
}
LORA = ("--enable-lora", "--max-loras=2", "--lora-modules", f"{OLD}=/lora/old")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, 2, model=V1, profile=EngineProfile.instant(), arguments=[LENGTH, *LORA]) as running:
        yield running


@pytest.fixture(scope="module")
def others() -> Iterator[Fleet]:
    with Fleet(1, 2, model=V2, profile=EngineProfile.instant(), arguments=[LENGTH]) as running:
        yield running


@pytest.fixture(scope="module")
def up(fleet: Fleet, others: Fleet, stack: Stack) -> Iterator[Process]:
    instances: dict[str, Any] = fleet.config()
    for role, entries in others.config().items():
        instances[role] += [{**each, "id": f"v2-{each['id']}"} for each in entries]
    limits = {**NO_EJECTION, "health_check_timeout": 30.0}  # none is unhealthy because the machine is busy
    config = {"strategy": "round_robin", "models": MODELS, **limits, **instances}
    with spawned(stack.up(config)) as process:
        yield process


@pytest_asyncio.fixture
async def v2(
    session: aiohttp.ClientSession, stack: Stack, others: Fleet, up: Process
) -> AsyncIterator[Client]:
    """A client of the same stack that looks at the instances of the second model."""
    client = Client(session, stack, others)
    yield client
    for instance in others.instances:
        await client.fault(instance.id)


async def load(client: Client, *names: str, instances: tuple[str, ...] = ("prefill-0", "decode-0")) -> None:
    """Load adapters on instances, as an operator does while they run."""
    for name in names:
        for instance in instances:
            url = client.fleet[instance].url + "/v1/load_lora_adapter"
            async with client.session.post(
                url, json={"lora_name": name, "lora_path": f"/lora/{name}"}
            ) as answer:
                assert answer.status == 200, await answer.text()


async def unload(client: Client, name: str, *instances: str) -> None:
    for instance in instances or ("prefill-0", "decode-0"):
        url = client.fleet[instance].url + "/v1/unload_lora_adapter"
        async with client.session.post(url, json={"lora_name": name}) as answer:
            assert answer.status == 200, await answer.text()


def is_v2(answer: Answer) -> bool:
    assert answer.status == 200, answer
    instances = {answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]}
    assert len({name.startswith("v2-") for name in instances}) == 1, instances
    return answer.json["model"] == V2


async def test_a_canary_gets_its_share(client: Client) -> None:
    answers: list[Answer] = []

    async def shared() -> bool:
        """Send so many; an instance that a busy machine makes seem unhealthy gets less."""
        answers[:] = [await client.complete(model="chat") for _ in range(50)]
        return abs(sum(map(is_v2, answers)) - 10) <= 1

    await until(shared)
    assert {a.headers["x-pd-decode"].startswith("v2-") for a in answers if is_v2(a)} == {True}
    metrics = (await client.admin("GET", "/metrics"))[1]
    assert f'pd_scheduler_rewrites_total{{model="{V2}",rule="chat"}}' in metrics


async def test_a_session_keeps_its_model(client: Client) -> None:
    sessions = {}
    for number in range(12):
        headers = {"x-session-id": f"s{number}"}
        body = {"model": "chat", "prompt": "hello", "max_tokens": 2}
        answers = [await client.post("/v1/completions", body, headers) for _ in range(3)]
        (sessions[number],) = {is_v2(answer) for answer in answers}
    assert set(sessions.values()) == {True, False}, "of twelve sessions some are the canary's"


@pytest.mark.parametrize("body", [{"stream": True}, {"n": 2}, {"prompt": "long " * 10_000, "max_tokens": 1}])
async def test_what_p_and_d_get_names_the_target(client: Client, v2: Client, body: dict[str, Any]) -> None:
    if "long" in str(body):
        body = {**body, "prompt": [1] * 4000, "user": "x" * 40_000}
    answer = await client.complete(model="latest", **body)
    assert answer.status == 200, answer
    assert answer.headers["x-pd-decode"].startswith("v2-")
    for role in ("prefill", "decode"):
        if (instance := answer.headers.get(f"x-pd-{role}")) is not None:
            seen = await v2.seen(instance.removeprefix("v2-"))
            (own,) = [e for e in seen if answer.headers["x-request-id"] in str(e["headers"])]
            assert own["body_bytes"] > 40_000 or json.loads(own["body"])["model"] == V2


async def test_a_further_attempt_has_the_same_model_and_no_hand_off(client: Client, v2: Client) -> None:
    for failing in ("decode-0", "decode-1"):
        await v2.fault(failing, status=500, paths=["/v1/completions"])
        answers = [await client.complete(model="latest", prompt="once more") for _ in range(4)]
        await v2.fault(failing)
        assert {answer.status for answer in answers} == {200}
        rescued = [answer for answer in answers if "x-pd-prefill" not in answer.headers]
        assert rescued, "one of them has come to the D that fails"
        for answer in rescued:
            name = answer.headers["x-pd-decode"].removeprefix("v2-")
            (seen,) = [e for e in await v2.seen(name) if answer.headers["x-request-id"] in str(e["headers"])]
            assert V2 in str(seen["body"])
            assert "kv_transfer_params" not in str(seen["body"])


async def test_other_paths_know_models_and_aliases_too(client: Client) -> None:
    for asked, model in (("latest", V2), (V1, V1), (V2, V2)):
        for _ in range(4):
            answer = await client.post("/v1/embeddings", {"model": asked, "input": "x"})
            assert (answer.status, answer.json["model"]) == (200, model)
    answer = await client.post("/v1/embeddings", {"model": "unheard-of", "input": "x"})
    assert (answer.status, answer.error["param"]) == (404, "model")


async def test_a_target_that_nobody_has_gets_nothing_while_another_is_served(client: Client) -> None:
    answers = [await client.complete(model="half-gone") for _ in range(8)]
    assert {(answer.status, answer.json["model"]) for answer in answers} == {(200, V1)}
    answer = await client.complete(model="gone")
    assert (answer.status, answer.headers["x-pd-reason"]) == (404, "unknown_model")
    assert answer.error["message"] == "The model `gone` does not exist."


async def test_the_list_is_that_of_all_instances(client: Client) -> None:
    answer = await client.send("GET", "/v1/models")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("application/json")
    found = {card["id"]: card for card in answer.json["data"]}
    assert answer.json["object"] == "list"
    assert len(found) == len(answer.json["data"]), "each is there once"
    assert {V1, V2, OLD, "chat", "latest", "half-gone"} <= found.keys()
    assert "gone" not in found
    own = {
        card["id"]: card for card in (await client.json(client.fleet["decode-0"].url + "/v1/models"))["data"]
    }
    assert found[V1].keys() == own[V1].keys()
    assert (found[OLD]["parent"], found[OLD]["root"]) == (V1, "/lora/old")
    assert found["latest"]["max_model_len"] == found[V2]["max_model_len"] == 4096
    answer = await client.send("POST", "/v1/models", {})
    assert answer.status == 405, "the instance's own answer"


async def test_an_unknown_model_is_refused_as_vllm_does(client: Client) -> None:
    before = await client.seen_by_all()
    answer = await client.complete(model="unheard-of")
    url = client.fleet["decode-0"].url + "/v1/completions"
    async with client.session.post(url, json={"model": "unheard-of", "prompt": "x"}) as response:
        assert (answer.status, answer.json) == (response.status, await response.json())
    assert answer.headers["x-pd-reason"] == "unknown_model"
    after = await client.seen_by_all()
    assert {name: after[name] - before[name] for name in after if name != "decode-0"} == dict.fromkeys(
        after.keys() - {"decode-0"}, 0
    ), "no instance was asked to serve it"


async def test_an_adapter_that_was_loaded_a_moment_ago_is_served(client: Client) -> None:
    for number in range(3):
        await load(client, f"new-{number}")
        answer = await client.complete(model=f"new-{number}")
        assert (answer.status, answer.headers["x-pd-decode"]) == (200, "decode-0"), answer
        assert answer.headers["x-pd-prefill"] == "prefill-0"
        assert answer.json["model"] == f"new-{number}"
    listed = [card["id"] for card in (await client.send("GET", "/v1/models")).json["data"]]
    assert listed.index(V1) < listed.index("new-0")
    for number in range(3):
        await unload(client, f"new-{number}")

    async def refused() -> bool:
        answer = await client.complete(model="new-1")
        assert answer.status == 404, answer
        return answer.headers.get("x-pd-reason") == "unknown_model"

    await until(refused)


async def test_requests_for_an_adapter_go_where_it_is_loaded(client: Client) -> None:
    both = ("prefill-0", "decode-0", "prefill-1", "decode-1")
    await load(client, "mine", instances=both)
    answers = [await client.complete(model="mine") for _ in range(8)]
    assert {answer.status for answer in answers} == {200}
    for role in ("prefill", "decode"):
        (used,) = {answer.headers[f"x-pd-{role}"] for answer in answers}
        assert "mine" in (await client.instance(used))["adapters_loaded"]
    everywhere = Counter([(await client.complete(model=V1)).headers["x-pd-decode"] for _ in range(8)])
    assert set(everywhere.values()) == {4}, "the base model's requests take turns as ever"
    await unload(client, "mine", *both)


async def test_the_health_of_a_model(client: Client) -> None:
    async def health(name: str) -> tuple[int, int]:
        """Of the listener and the admin interface."""
        answer = await client.send("GET", f"/health?model={name}")
        return answer.status, (await client.admin("GET", f"/readyz?model={name}"))[0]

    for name in (V1, V2, "chat", "latest", "half-gone", OLD):
        assert await health(name) == (200, 200), name
    for name in ("gone", "unheard-of"):
        assert await health(name) == (404, 404), name
    for instance in ("v2-decode-0", "v2-decode-1"):
        assert (await client.admin("POST", f"/instances/{instance}/drain"))[0] == 202
    assert await health(V2) == (503, 503)
    assert await health("chat") == (200, 200), "the other target serves"
    answers = [await client.complete(model="chat") for _ in range(6)]
    assert {answer.json["model"] for answer in answers} == {V1}
    answer = await client.complete(model=V2)
    assert (answer.status, answer.headers["x-pd-reason"]) == (503, "no_decode")
    assert (await client.send("GET", "/health")).status == 200
    for instance in ("v2-decode-0", "v2-decode-1"):
        assert (await client.admin("POST", f"/instances/{instance}/undrain"))[0] == 200
    assert await health(V2) == (200, 200)
    assert (await client.send("GET", "/health?other=1")).status == 200, "Envoy's own"


async def test_operators_see_the_models(client: Client) -> None:
    found = {each["name"]: each for each in (await client.admin("GET", "/models"))[1]["models"]}
    assert (found[V1]["kind"], found[V1]["health"], found[V1]["prefill"], found[V1]["decode"]) == (
        "base",
        "served",
        2,
        2,
    )
    assert found[OLD]["kind"] == "adapter"
    assert (found["chat"]["kind"], found["chat"]["targets"]) == ("alias", {V1: 80, V2: 20})
    assert found["gone"]["health"] == "unknown"
    await client.complete(model="latest")
    _, decisions = await client.admin("GET", "/decisions?limit=1")
    (newest,) = decisions["decisions"]
    assert (newest["model"], newest["asked_model"]) == (V2, "latest")


async def test_no_name_of_a_clients_is_logged(client: Client, up: Process) -> None:
    await client.complete(model="secret-model-name")
    await client.post("/v1/embeddings", {"model": "secret-model-name", "input": "x"})
    assert "secret-model-name" not in up.output
