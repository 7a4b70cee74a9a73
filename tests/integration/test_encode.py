"""Images are encoded on encode instances, with a real Envoy in front and simulated engines behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.processes import NO_EJECTION, Answer, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

CHAT = "/v1/chat/completions"
_numbers = iter(range(1_000_000))


def image(name: str = "", size: int = 100) -> dict[str, Any]:
    """An image of its own, or the one of a name."""
    data = name or f"image{next(_numbers)}"
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data:A<{size}}"}}


def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    text = {"type": "text", "text": "What is this?"}
    return {"messages": [{"role": "user", "content": [text, *parts]}], "max_tokens": 8, **more}


@pytest.fixture(scope="module", params=["cpu", "example"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    storage = tmp_path_factory.mktemp("encodings")
    arguments = [f"--ec-connector={request.param}", f"--ec-storage={storage}"]
    arguments += ["--max-model-len=2000000", "--num-blocks=200000"]
    with Fleet(2, 2, encode=2, profile=EngineProfile.instant(), arguments=arguments) as running:
        yield running


@pytest.fixture(scope="module")
def connector(fleet: Fleet) -> str:
    return "ec-nixl" if "--ec-connector=cpu" in fleet._arguments["encode"] else "ec-example"


@pytest.fixture(scope="module")
def settings(fleet: Fleet, connector: str) -> dict[str, Any]:
    return {
        "strategy": "round_robin",
        "encode_connector": connector,
        "encode_timeout": 3600.0,
        **NO_EJECTION,
        **fleet.config(),
    }


@pytest.fixture(scope="module")
def up(stack: Stack, settings: dict[str, Any]) -> Iterator[Process]:
    with spawned(stack.up(settings)) as process:
        yield process


async def use(client: Client, settings: dict[str, Any]) -> None:
    """Have the scheduler read other settings."""
    client.stack.write_config(settings)
    status, answer = await client.admin("POST", "/reload")
    assert (status, answer["needs_restart"]) == (200, [])


@pytest_asyncio.fixture
async def client(client: Client) -> AsyncIterator[Client]:
    await client.until_split()

    async def encodes() -> bool:
        states = await client.states()
        return all(state == "healthy" for state in states.values())

    await until(encodes)
    yield client


async def counts(client: Client, role: str) -> dict[str, int]:
    """What has become of media items at the instances of a role."""
    total: dict[str, int] = {}
    for each in client.fleet.instances:
        if each.role == role:
            for name, count in (await client.json(each.url + "/_sim/stats"))["encodings"].items():
                total[name] = total.get(name, 0) + count
    return total


async def gained(client: Client, role: str, before: dict[str, int]) -> dict[str, int]:
    now = await counts(client, role)
    return {name: count - before.get(name, 0) for name, count in now.items() if count != before.get(name, 0)}


async def alone(client: Client, body: dict[str, Any], path: str = CHAT) -> str:
    """The text of an undivided engine."""
    async with client.session.post(client.fleet["decode-0"].url + path, json=body) as response:
        return (await response.read()).decode()


of_one_kind = pytest.mark.parametrize("fleet", ["cpu"], indirect=True)
"""For what does not depend on how encodings are handed over."""


def encoded(answer: Answer) -> str:
    """Which E the decision names, and how many items it has encoded."""
    parts = answer.headers["x-pd-decision"].split(", ")
    return next((part.removeprefix("encode=") for part in parts if part.startswith("encode=")), "")


async def ask(client: Client, body: dict[str, Any], path: str = CHAT) -> Answer:
    return await client.post(path, body, headers={"x-pd-explain": "1"})


async def test_each_item_is_encoded_before_the_prefill(client: Client) -> None:
    before = await counts(client, "encode"), await counts(client, "prefill")
    body = chat(image(), image(), image("twice"), image("twice"))
    answer = await ask(client, body)
    assert answer.text == json.loads(await alone(client, body))["choices"][0]["message"]["content"]
    assert encoded(answer).endswith(" 3 of 3")
    assert "x-pd-prefill" in answer.headers
    assert await gained(client, "encode", before[0]) == {"encoded": 3}
    assert (await gained(client, "prefill", before[1]))["fetched"] == 3
    assert "encoded" not in await gained(client, "prefill", before[1])


async def test_e_gets_the_item_alone_and_p_the_hand_off(client: Client, connector: str) -> None:
    body = chat(image(), mm_processor_kwargs={"max_pixels": 1000}, temperature=0, stream=True)
    answer = await ask(client, body)
    names = encoded(answer).split()[0]
    seen = (await client.seen(names))[-1]
    assert seen["path"] == CHAT
    assert json.loads(seen["body"]) == {
        "mm_processor_kwargs": {"max_pixels": 1000},
        "messages": [{"role": "user", "content": [body["messages"][0]["content"][1]]}],
        "max_tokens": 1,
        "stream": False,
    }
    headers = {name.lower(): value for name, value in seen["headers"].items()}
    assert headers["x-request-id"] == answer.headers["x-request-id"] + "-0"
    sent = json.loads((await client.seen(answer.headers["x-pd-prefill"]))[-1]["body"])
    params = sent.get("ec_transfer_params")
    assert bool(params) == (connector == "ec-nixl")
    if params:
        ((_, where),) = params.items()
        assert where["peer_port"] == client.fleet[names].port
    at_d = json.loads((await client.request_of(answer))["body"])
    assert "ec_transfer_params" not in at_d, "it has P's KV cache"
    assert "kv_transfer_params" in at_d


async def test_messages_of_anthropic(client: Client) -> None:
    before = await counts(client, "encode"), await counts(client, "prefill")
    source = {"type": "base64", "media_type": "image/png", "data": f"claude{next(_numbers)}"}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
    answer = await ask(client, body, "/v1/messages")
    assert answer.status == 200
    assert encoded(answer).endswith(" 1 of 1")
    assert await gained(client, "encode", before[0]) == {"encoded": 1}
    assert await gained(client, "prefill", before[1]) == {"fetched": 1}


@of_one_kind
async def test_an_image_goes_to_the_e_that_has_it(client: Client) -> None:
    before = await counts(client, "encode")
    body = chat(image())
    first, *others = [await ask(client, body) for _ in range(5)]
    assert {encoded(each) for each in others} == {encoded(first)}
    found = await gained(client, "encode", before)
    assert found == {"encoded": 1, "cached": 4}


async def test_d_that_prefills_gets_the_hand_off_itself(client: Client, connector: str) -> None:
    before = await counts(client, "decode")
    body = chat(image(), n=2)  # cannot be split
    answer = await ask(client, body)
    assert answer.status == 200
    assert encoded(answer).endswith(" 1 of 1")
    assert "x-pd-prefill" not in answer.headers
    at_d = json.loads((await client.request_of(answer))["body"])
    assert bool(at_d.pop("ec_transfer_params", None)) == (connector == "ec-nixl")
    assert at_d == body
    assert await gained(client, "decode", before) == {"fetched": 1}


@of_one_kind
async def test_a_request_without_media_is_not_looked_at(client: Client) -> None:
    before = await client.seen_by_all()
    answer = await ask(client, chat())
    assert encoded(answer) == ""
    after = await client.seen_by_all()
    assert [before[name] for name in ("encode-0", "encode-1")] == [
        after[name] for name in ("encode-0", "encode-1")
    ]


@of_one_kind
async def test_a_clients_own_hand_off_is_cut_out(client: Client) -> None:
    evil = {"ec_transfer_params": {"hash": "no object: it ends an engine"}}
    for body in (chat(image(), **evil), chat(image(), n=2, **evil), chat(**evil)):
        assert (await ask(client, body)).status == 200
    spelled = r'"\u0065c_tr\u0061nsfer_params": {"hash": 1}, "max_tokens"'
    raw = json.dumps(chat(image())).replace('"max_tokens"', spelled)
    assert (await client.post(CHAT, raw.encode())).status == 200
    assert set((await client.states()).values()) == {"healthy"}


@of_one_kind
@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"status": 503}, {"reset": True}, {"half": True}],
    ids=lambda fault: next(iter(fault)),
)
async def test_what_one_e_fails_another_one_encodes(client: Client, fault: dict[str, Any]) -> None:
    await client.fault("encode-0", **fault)
    before = await counts(client, "prefill")
    bodies = [chat(image()) for _ in range(4)]
    answers = await asyncio.gather(*(ask(client, body) for body in bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.text == json.loads(await alone(client, body))["choices"][0]["message"]["content"]
    lost = "reset" in fault or "half" in fault  # the item may be the reason: P encodes it
    found = await gained(client, "prefill", before)
    assert sum(found.values()) == 4
    assert lost or found == {"fetched": 4}
    _, page = await client.admin("GET", "/metrics")
    assert 'pd_scheduler_encode_failures_total{encode="encode-0"' in page


@of_one_kind
async def test_p_encodes_what_no_e_does(client: Client) -> None:
    for each in ("encode-0", "encode-1"):
        await client.fault(each, status=500)
    before = await counts(client, "prefill")
    body = chat(image(), image())
    answer = await ask(client, body)
    assert answer.text == json.loads(await alone(client, body))["choices"][0]["message"]["content"]
    assert encoded(answer).endswith(" 0 of 2")
    assert await gained(client, "prefill", before) == {"encoded": 2}


@of_one_kind
async def test_what_e_refuses_is_ps_to_refuse(client: Client) -> None:
    for each in client.fleet.instances:
        await client.fault(each.id, status=400)
    answer = await ask(client, chat(image()))
    assert answer.status == 400
    assert answer.error["message"] == "Simulated fault"
    assert "healthy" in (await client.states())["encode-0"]


@of_one_kind
async def test_a_client_that_leaves_ends_what_e_does(client: Client, fleet: Fleet) -> None:
    before = await client.seen_by_all()
    for each in ("encode-0", "encode-1"):
        await client.fault(each, delay=3600)
    task = asyncio.ensure_future(ask(client, chat(image(), image())))

    async def delivered() -> bool:
        seen = await client.seen_by_all()
        return sum(seen[each] - before[each] for each in ("encode-0", "encode-1")) == 2

    await until(delivered)
    assert await client.in_flight() == 2
    task.cancel()
    await client.until_in_flight(0)

    async def closed() -> bool:
        loads = [await client.json(fleet[each].url + "/load") for each in ("encode-0", "encode-1")]
        return all(load["server_load"] == 0 for load in loads)

    await until(closed)
    after = await client.seen_by_all()
    assert [after[each] - before[each] for each in ("prefill-0", "prefill-1")] == [0, 0]


@of_one_kind
async def test_what_waits_at_an_e_that_hangs_is_given_up(client: Client, settings: dict[str, Any]) -> None:
    await use(client, {**settings, "health_check_timeout": 1.0})
    before = await client.seen_by_all()
    for each in ("encode-0", "encode-1"):
        await client.fault(each, delay=3600)
    bodies = [chat(image()) for _ in range(4)]
    tasks = [asyncio.ensure_future(ask(client, body)) for body in bodies]

    async def delivered() -> bool:
        seen = await client.seen_by_all()
        return sum(seen[each] - before[each] for each in ("encode-0", "encode-1")) == 4

    await until(delivered)
    with client.frozen("encode-0", "encode-1"):
        answers = await asyncio.gather(*tasks)
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.text == json.loads(await alone(client, body))["choices"][0]["message"]["content"]
    assert {encoded(each).split(" ", 1)[1] for each in answers} == {"0 of 1"}
    await use(client, settings)

    async def serve() -> bool:
        return set((await client.states()).values()) == {"healthy"}

    await until(serve)


@of_one_kind
async def test_an_e_that_is_killed(client: Client, fleet: Fleet) -> None:
    fleet.kill("encode-0")
    try:
        bodies = [chat(image()) for _ in range(6)]
        answers = await asyncio.gather(*(ask(client, body) for body in bodies))
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.text == json.loads(await alone(client, body))["choices"][0]["message"]["content"]
    finally:
        fleet.restart("encode-0")


@of_one_kind
async def test_an_image_of_megabytes(client: Client) -> None:
    body = chat(image(size=3 << 20), image(size=2 << 20))
    answer = await ask(client, body)
    assert (answer.status, encoded(answer).split(" ", 1)[1]) == (200, "2 of 2")


@of_one_kind
async def test_it_is_shown(client: Client) -> None:
    answer = await ask(client, chat(image()))
    _, found = await client.admin("GET", "/decisions?request_id=" + answer.headers["x-request-id"])
    (decision,) = found["decisions"]
    shown = decision["encode"]
    assert (shown["items"], shown["encoded"], len(shown["attempts"])) == (1, 1, 1)
    assert shown["attempts"][0]["outcome"] == "ok"
    _, status = await client.admin("GET", "/status")
    assert status["roles"]["encode"] == {"total": 2, "routable": 2}
    _, page = await client.admin("GET", "/metrics")
    for line in (
        'pd_scheduler_routable_instances{role="encode"} 2.0',
        'pd_scheduler_in_flight{instance="encode-0",role="encode"} 0.0',
        'pd_scheduler_media_items_total{outcome="encoded"}',
        "pd_scheduler_encode_duration_seconds_count{encode=",
    ):
        assert line in page
