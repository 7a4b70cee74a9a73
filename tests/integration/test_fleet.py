"""Instances that come, go, drain, die and return, as Envoy and clients see it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.support.processes import Answer, Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile


async def test_an_instance_comes_and_goes(client: Client) -> None:
    with Fleet(1, 1, profile=EngineProfile.instant()) as more:
        for instance in more.instances:
            new = {
                "id": f"new-{instance.role}",
                "role": instance.role,
                "host": "localhost",
                "port": instance.port,
            }
            status, found = await client.admin("POST", "/instances", new)
            assert (status, found["state"]) == (201, "starting")

        def names(hosts: dict[str, str]) -> set[str]:
            return {f"{each.role} 127.0.0.1:{each.port}" for each in more.instances} & set(hosts)

        async def known() -> bool:
            return len(names(await client.envoy_hosts())) == 2

        await until(known)

        await until(_all_used(client, {"new-prefill", "new-decode"}))
        for instance in more.instances:
            status, _ = await client.admin("DELETE", f"/instances/new-{instance.role}")
            assert status == 204

        async def forgotten() -> bool:
            return not names(await client.envoy_hosts())

        await until(forgotten)
        for _ in range(6):
            assert "new" not in (await client.complete()).headers["x-pd-decode"]


async def test_drain(client: Client) -> None:
    body = {"prompt": "p", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    await client.fault("decode-0")
    async with client.session.post(client.stack.url + "/v1/completions", json=body) as response:
        name = response.headers["x-pd-decode"]
        status, found = await client.admin("POST", f"/instances/{name}/drain")
        assert (status, found["state"]) == (202, "draining")
        host = f"decode 127.0.0.1:{client.fleet[name].port}"

        async def told() -> bool:
            return (await client.envoy_hosts())[host] == "DRAINING"

        await until(told)
        answers = [await client.complete() for _ in range(4)]
        assert name not in {answer.headers["x-pd-decode"] for answer in answers}
        assert (await response.read()).endswith(b"data: [DONE]\n\n"), "the running stream goes on"
    # Remove and add it again: that is how an instance comes back.
    instance = client.fleet[name]
    await client.admin("DELETE", f"/instances/{name}")
    new = {"id": name, "role": "decode", "host": instance.host, "port": instance.port}
    assert (await client.admin("POST", "/instances", new))[0] == 201

    async def back() -> bool:
        return (await client.complete()).headers["x-pd-decode"] == name

    await until(back)


async def test_a_killed_instance_is_avoided_and_serves_again(client: Client) -> None:
    for name in ("prefill-1", "decode-1"):
        client.fleet.kill(name)

    async def avoided() -> bool:
        states = await client.states()
        return states["prefill-1"] == states["decode-1"] == "unhealthy"

    async def avoided_without_errors() -> bool:
        assert (await client.complete()).status == 200
        return await avoided()

    await until(avoided_without_errors)
    for name in ("prefill-1", "decode-1"):
        client.fleet.restart(name)
    await until(_all_used(client, {"prefill-1", "decode-1"}))


async def test_a_strategy_change_loses_no_request(client: Client) -> None:
    stop = asyncio.Event()
    answers: list[Answer] = []

    async def load() -> None:
        while not stop.is_set():
            answers.append(await client.complete())

    tasks = [asyncio.ensure_future(load()) for _ in range(4)]
    for name in ("least_load", "weighted", "round_robin") * 3:
        status, found = await client.admin("PUT", "/strategy", {"strategy": name})
        assert (status, found["strategy"]) == (200, name)
        count = len(answers)

        async def more(count: int = count) -> bool:
            return len(answers) >= count + 8

        await until(more)
    stop.set()
    await asyncio.gather(*tasks)
    assert {answer.status for answer in answers} == {200}


async def test_a_strategy_that_does_not_exist_changes_nothing(client: Client) -> None:
    status, found = await client.admin("PUT", "/strategy", {"strategy": "best"})
    assert status == 400
    assert "least_load" in found["error"]
    assert (await client.admin("GET", "/strategy"))[1]["strategy"] == "round_robin"


async def test_metrics_tell_what_happened(client: Client) -> None:
    answer = await client.complete()
    _, page = await client.admin("GET", "/metrics")
    assert f'pd_scheduler_requests_total{{decode="{answer.headers["x-pd-decode"]}",served="split"}}' in page
    assert (
        f'pd_scheduler_prefill_duration_seconds_count{{prefill="{answer.headers["x-pd-prefill"]}"}}' in page
    )
    assert 'pd_scheduler_instance_state{instance="decode-0",role="decode",state="healthy"} 1.0' in page
    assert 'pd_scheduler_routable_instances{role="prefill"} 2.0' in page


async def test_a_burst_between_two_scrapes_spreads(client: Client) -> None:
    await client.admin("PUT", "/strategy", {"strategy": "least_load"})
    try:
        answers = await asyncio.gather(*(client.complete(max_tokens=40) for _ in range(40)))
        assert {answer.status for answer in answers} == {200}
        for role in ("prefill", "decode"):
            got = Counter(answer.headers.get(f"x-pd-{role}") for answer in answers)
            assert set(got) == {f"{role}-0", f"{role}-1"}
            assert min(got.values()) >= 12, got
    finally:
        await client.admin("PUT", "/strategy", {"strategy": "round_robin"})


def _all_used(client: Client, names: set[str]) -> Callable[[], Awaitable[bool]]:
    """Return a condition that sends a request and holds when all of ``names`` have served one."""
    used: set[str] = set()

    async def condition() -> bool:
        answer = await client.complete()
        assert answer.status == 200, answer
        # What one that has just returned loses is prefilled by another D.
        used.update((answer.headers.get("x-pd-prefill", ""), answer.headers["x-pd-decode"]))
        return names <= used

    return condition
