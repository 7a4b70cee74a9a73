"""Overload: who waits in the scheduler, who is served next, who is refused, and what clients see of it."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest
import yaml

from tests.support.overload import PATIENT, Overload, overload
from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

ONE_AT_A_TIME = {"max_waiting": 1}
"""A prefill instance that has a request is saturated until its next scrape, or until that has ended."""

SECURITY = (Path(__file__).parents[2] / "docs/security.md").read_text()

Opened = AbstractAsyncContextManager[tuple[Overload, Process]]


class Open(Protocol):
    def __call__(self, **settings: Any) -> Opened: ...


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


@pytest.fixture
def stacks(fleet: Fleet, tmp_path: Path) -> Open:
    """Opens a stack with settings of its own in front of one P and one D."""
    return lambda **settings: overload(fleet, tmp_path, **settings)


async def texts(load: Overload, prompts: list[str]) -> list[str]:
    """Return the text of the answer to each prompt."""
    return [(await load.ask(prompt)).text for prompt in prompts]


async def whole_text(load: Overload, prompt: str) -> str:
    """Return the text that decode gives to a prompt without a hand-off."""
    body = {"prompt": prompt, "max_tokens": 4}
    async with load.client.session.post(load.fleet.decode[0].url + "/v1/completions", json=body) as response:
        return str((await response.json())["choices"][0]["text"])


# -- waiting


@pytest.mark.parametrize("limit", [{"max_waiting": 1}, {"max_in_flight_tokens": 1}])
async def test_those_that_wait_are_served_when_an_instance_is_free(stacks: Open, limit: Any) -> None:
    prompts = [f"Prompt {number}" for number in range(20)]
    async with stacks(**limit) as (load, _):
        expected = await texts(load, prompts)
        with load.held("prefill-0"):
            tasks = [load.ask(prompt) for prompt in prompts]
            await load.until_waiting(19)
            assert await load.client.in_flight() == 1
        answers = await asyncio.gather(*tasks)
        assert [answer.text for answer in answers] == expected
        assert {answer.headers["x-pd-prefill"] for answer in answers} == {"prefill-0"}
        metrics = await load.metrics()
        assert metrics['pd_scheduler_queue_wait_seconds_count{outcome="served"}'] == 19
        assert metrics["pd_scheduler_held_bytes"] == 0


async def test_a_full_queue(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME, queue_size=1) as (load, _):
        with load.held("prefill-0"):
            first = load.ask("first")
            await load.client.until_in_flight(1)
            second = load.ask("second")
            await load.until_waiting(1)
            refused = await load.ask("third")
            assert (refused.status, refused.headers["x-pd-reason"]) == (429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.error["type"] == "TooManyRequestsError"
            assert "queue is full" in refused.error["message"]
        assert [(await task).status for task in (first, second)] == [200, 200]
        rejected = 'pd_scheduler_requests_rejected_total{reason="queue_full",status="429"}'
        assert (await load.metrics())[rejected] == 1


async def test_one_that_waits_too_long(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME, queue_timeout=0.5) as (load, _):
        with load.held("prefill-0"):
            first = load.ask("first")
            await load.client.until_in_flight(1)
            refused = await load.ask("second")
            assert (refused.status, refused.headers["x-pd-reason"]) == (429, "queue_timeout")
            assert int(refused.headers["retry-after"]) >= 1
            assert "waited too long" in refused.error["message"]
        assert (await first).status == 200
        metrics = await load.metrics()
        assert metrics['pd_scheduler_queue_wait_seconds_count{outcome="refused"}'] == 1
        assert metrics['pd_scheduler_queue_wait_seconds_sum{outcome="refused"}'] >= 0.4, "not at once"


async def test_a_client_that_leaves_frees_its_place(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME, queue_size=1) as (load, _):
        with load.held("prefill-0"):
            first = load.ask("first of those that leave")
            await load.client.until_in_flight(1)
            gone = load.ask("gone")
            await load.until_waiting(1)
            gone.cancel()
            await load.until_waiting(0)
            last = load.ask("last of those that leave")
            await load.until_waiting(1)
        assert [(await task).status for task in (first, last)] == [200, 200]
        for instance in load.fleet.instances:
            assert "gone" not in await load.prompts_at(instance.id)
        assert (await load.metrics())['pd_scheduler_queue_wait_seconds_count{outcome="gone"}'] == 1


async def test_a_decode_fleet_that_is_full_holds_back_the_prefill(fleet: Fleet, tmp_path: Path) -> None:
    """No prefill is done whose hand-off would have to wait, and age, until decode has room."""
    small = ["--num-blocks=64", "--decode-base=0.05", "--max-model-len=1000"]
    with Fleet(1, 1, profile=EngineProfile.instant(), decode_arguments=small) as full:
        settings = {"health_check_interval": 0.2, "max_kv_usage": 0.3}
        async with overload(full, tmp_path, **settings) as (load, _):
            url = load.client.stack.url + "/v1/completions"
            long = {"prompt": "word " * 150, "max_tokens": 800, "ignore_eos": True, "stream": True}
            async with load.client.session.post(url, json=long) as running:
                await running.content.readline()
                waits = load.ask("held back")
                await load.until_waiting(1)
                assert "held back" not in await load.prompts_at("prefill-0")
            answer = await waits  # decode is free, since the client of the long answer has left
            assert answer.status == 200
            assert answer.headers["x-pd-prefill"] == "prefill-0"
            seen = await load.client.request_of(answer)
            assert seen["outcomes"] == ["good"]


async def test_a_decode_instance_with_room_is_not_waited_for(tmp_path: Path) -> None:
    """Though it has got more since its last scrape than may wait there: it runs them side by side."""
    with Fleet(1, 1, profile=EngineProfile.instant(), decode_arguments=["--decode-base=0.05"]) as slow:
        async with overload(slow, tmp_path, **ONE_AT_A_TIME) as (load, _):
            url = load.client.stack.url + "/v1/completions"
            body = {"prompt": "p", "max_tokens": 1000, "ignore_eos": True, "stream": True}
            async with AsyncExitStack() as answers:
                for _ in range(6):
                    answer = load.client.session.post(url, json=body)
                    assert (await answers.enter_async_context(answer)).status == 200
                assert await load.client.in_flight() == 6


async def test_what_only_decode_is_for_does_not_wait_for_prefill(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME) as (load, _):
        with load.held("prefill-0"):
            tasks = [load.ask("first")]
            await load.client.until_in_flight(1)
            tasks += [load.ask(f"waits {number}") for number in range(30)]
            await load.until_waiting(30)
            assert (await load.ask("two answers", n=2)).status == 200
        assert {(await task).status for task in tasks} == {200}


async def test_an_instance_that_comes_serves_those_that_wait(fleet: Fleet, stacks: Open) -> None:
    with Fleet(1, 0, profile=EngineProfile.instant()) as more:
        (new,) = more.prefill
        async with stacks(**ONE_AT_A_TIME) as (load, _):
            with load.held("prefill-0"):
                held = load.ask("held")
                await load.client.until_in_flight(1)
                waits = load.ask("waits")
                await load.until_waiting(1)
                body = {"id": "new", "role": "prefill", "host": new.host, "port": new.port}
                assert (await load.client.admin("POST", "/instances", body))[0] == 201
                assert (await waits).headers["x-pd-prefill"] == "new"
            assert (await held).status == 200


async def test_instances_that_go_leave_nobody_waiting(stacks: Open) -> None:
    """Without any prefill instance there is nothing to wait for: decode serves alone, at once."""
    async with stacks(**ONE_AT_A_TIME) as (load, _):
        with load.held("prefill-0"):
            held = load.ask("held")
            await load.client.until_in_flight(1)
            waits = load.ask("waits")
            await load.until_waiting(1)
            assert (await load.client.admin("POST", "/instances/prefill-0/drain?force=true"))[0] == 202
            answer = await waits
            assert answer.status == 200
            assert "x-pd-prefill" not in answer.headers
        assert (await held).status == 200


# -- who is next


async def test_a_higher_priority_is_served_first(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME) as (load, _):
        with load.held("prefill-0"):
            tasks = [load.ask("zero")]
            await load.client.until_in_flight(1)
            tasks += await load.ask_in_turn(
                [("low", {"x-pd-priority": "-1"}), ("usual", {}), ("high", {"x-pd-priority": "5"})]
            )
            metrics = await load.metrics()
            assert {p: metrics[f'pd_scheduler_queue_requests{{priority="{p}"}}'] for p in (-1, 0, 5)} == {
                -1: 1,
                0: 1,
                5: 1,
            }
        assert {(await task).status for task in tasks} == {200}
        assert (await load.prompts_at("prefill-0"))[-4:] == ["zero", "high", "usual", "low"]


async def test_a_higher_priority_displaces_a_lower_one(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME, queue_size=1) as (load, _):
        with load.held("prefill-0"):
            first = load.ask("first")
            await load.client.until_in_flight(1)
            low = load.ask("low")
            await load.until_waiting(1)
            high = load.ask("high", {"x-pd-priority": "5"})
            refused = await low
            assert (refused.status, refused.headers["x-pd-reason"]) == (429, "queue_displaced")
            assert refused.error["message"]
        assert [(await task).status for task in (first, high)] == [200, 200]


async def test_a_tenant_with_many_requests_does_not_starve_another(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME) as (load, _):
        with load.held("prefill-0"):
            tasks = [load.ask("the one before")]
            await load.client.until_in_flight(1)
            many = [(f"many {number:02}", {"x-pd-tenant": "many"}) for number in range(20)]
            tasks += await load.ask_in_turn([*many, ("only one", {"x-pd-tenant": "few"})])
        assert {(await task).status for task in tasks} == {200}
        order = (await load.prompts_at("prefill-0"))[-22:]
        assert order.index("only one") <= 2, "right after the one before, or after one of the other's"


# -- headers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-pd-priority", "high"),
        ("x-pd-priority", "101"),
        ("x-pd-priority", ""),
        ("x-pd-ttft-slo-ms", "-1"),
        ("x-pd-tpot-slo-ms", "0.5"),
    ],
)
async def test_a_bad_header_is_named(client: Client, name: str, value: str) -> None:
    before = await client.seen_by_all()
    for path in ("/v1/completions", "/v1/embeddings"):
        answer = await client.post(path, {"prompt": "p", "input": "p"}, {name: value})
        assert (answer.status, answer.headers["x-pd-reason"]) == (400, "bad_header")
        assert name in answer.error["message"]
    assert await client.seen_by_all() == before


ASKED = {"x-pd-priority": "5", "x-pd-tenant": "t", "X-PD-TTFT-SLO-MS": "500", "x-pd-tpot-slo-ms": "50"}
FORGED = {
    "x-pd-id": "forged",
    "X-PD-Prefill": "forged",
    "x-pd-decode": "forged",
    "x-pd-reason": "forged",
    "x-gateway-destination-endpoint": "127.0.0.1:1",
}


async def check_headers(client: Client, path: str, ours: set[str]) -> None:
    """Send all headers that a client may or may not send; instances get ``ours`` only, from the scheduler."""
    before = await client.seen_by_all()
    answer = await client.post(path, {"prompt": "p", "max_tokens": 2}, {**ASKED, **FORGED})
    assert answer.status == 200
    legs = [each for name, number in before.items() for each in await client.seen_since(name, number)]
    assert legs
    for leg in legs:
        headers = {name.lower(): value for name, value in leg["headers"].items()}
        assert {name for name in headers if name.startswith(("x-pd-", "x-gateway"))} <= ours
        assert "forged" not in headers.values()
    assert "forged" not in answer.headers.values()


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_asking_headers_end_at_the_scheduler_and_forged_ones_before(client: Client, path: str) -> None:
    await check_headers(client, path, {"x-pd-id", "x-pd-prefill", "x-gateway-destination-endpoint"})


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_neither_reach_an_instance_without_the_scheduler(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path, path: str
) -> None:
    stack = Stack(tmp_path)
    client = Client(session, stack, fleet)
    with spawned(stack.envoy()) as envoy:
        with spawned(stack.serve(fleet.config())) as scheduler:
            await ready(client, envoy)
            scheduler.signal(signal.SIGKILL)
            scheduler.wait()
        await check_headers(client, path, set())


async def test_priority_can_be_taken_away_from_clients(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    """By what docs/security.md shows."""
    (shown,) = re.findall(r"```yaml\n(- name: envoy.filters.http.header_mutation.*?)```", SECURITY, re.DOTALL)
    stack = Stack(tmp_path)
    command = stack.envoy()
    path = tmp_path / "envoy.yaml"
    config = yaml.safe_load(path.read_text())
    (listener,) = [each for each in config["static_resources"]["listeners"] if each["name"] == "ingress"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (at,) = [n for n, each in enumerate(filters) if each["name"] == "envoy.filters.http.ext_proc"]
    filters[at:at] = yaml.safe_load(shown)
    path.write_text(yaml.safe_dump(config))
    with spawned(command) as envoy, spawned(stack.serve(fleet.config())):
        client = Client(session, stack, fleet)
        await ready(client, envoy)

        await client.until_split()
        answer = await client.post("/v1/completions", {"prompt": "p"}, {"x-pd-priority": "not a number"})
        assert answer.status == 200
        assert answer.headers["x-pd-prefill"]


# -- late binding


async def test_late_binding(tmp_path: Path) -> None:
    """A burst waits in the scheduler, not at the instances, and all of it is served right."""
    prompts = [f"Prompt {number}: " + "word " * 400 for number in range(20)]
    # 0.25 s each: short ones may queue at an instance.
    arguments = ["--prefill-rate=2000", "--max-model-len=4096"]
    with Fleet(2, 1, prefill_arguments=arguments, decode_arguments=["--instant"]) as two:
        async with overload(two, tmp_path, late_binding=True, health_check_interval=0.5) as (load, _):
            await texts(load, prompts[:4])  # teaches the load model
            prompts = prompts[4:]
            with load.held("prefill-0", "prefill-1"):
                tasks = [load.ask(prompt) for prompt in prompts]

                async def all_are_there() -> bool:
                    return await load.waiting() + await load.client.in_flight() == len(prompts)

                await until(all_are_there)
                at = [(await load.client.instance(each.id))["in_flight"] for each in two.prefill]
                assert max(at) <= 5, "those that wait are not at an instance"
            answers = await asyncio.gather(*tasks)
            found = [answer.text for answer in answers]
            assert found == [await whole_text(load, prompt) for prompt in prompts]
            assert len(set(found)) > 1
            assert {answer.headers["x-pd-prefill"] for answer in answers} == {"prefill-0", "prefill-1"}


# -- ends


async def test_a_drain_serves_those_that_wait(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME) as (load, process):
        with load.held("prefill-0"):
            tasks = [load.ask("first")]
            await load.client.until_in_flight(1)
            tasks += await load.ask_in_turn([(f"waits {number}", {}) for number in range(5)])
            process.signal(signal.SIGTERM)

            async def draining() -> bool:
                return "draining" in process.output

            await until(draining)
        assert {(await task).status for task in tasks} == {200}
        assert await asyncio.to_thread(process.wait) == 0


async def test_a_drain_refuses_those_that_cannot_be_served_in_time(stacks: Open) -> None:
    async with stacks(**ONE_AT_A_TIME, drain_timeout=5.0) as (load, process):
        with load.held("prefill-0"):
            first = load.ask("first")
            await load.client.until_in_flight(1)
            waits = load.ask("waits")
            await load.until_waiting(1)
            process.signal(signal.SIGTERM)
            refused = await waits
            assert (refused.status, refused.headers["x-pd-reason"]) == (503, "draining")
            assert refused.headers["retry-after"] == "1"
            assert refused.error["type"] == "ServiceUnavailableError"
        assert (await first).status == 200
        assert await asyncio.to_thread(process.wait) == 0


async def test_a_scheduler_that_is_killed_with_requests_in_its_queue(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    stack = Stack(tmp_path)
    client = Client(session, stack, fleet)
    load = Overload(client)
    with (
        spawned(stack.envoy()) as envoy,
        spawned(stack.serve({**PATIENT, **ONE_AT_A_TIME, **fleet.config()})) as scheduler,
    ):
        await ready(client, envoy)

        await client.until_split()
        with load.held("prefill-0"):
            tasks = [load.ask("first")]
            await load.client.until_in_flight(1)
            tasks += await load.ask_in_turn([(f"waits {number}", {}) for number in range(5)])
            scheduler.signal(signal.SIGKILL)
            answers = await asyncio.gather(*tasks)
        assert {answer.status for answer in answers} == {200}
        assert not any("x-pd-prefill" in answer.headers for answer in answers)
