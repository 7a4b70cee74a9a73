"""Leases, aborts and load: an engine that takes its time."""

import asyncio
import signal
from typing import Any

import aiohttp
import pytest

from tests.support.sim import BODY, COMPLETIONS, Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="module")
def slow() -> Any:
    """Transfers never end here, nor do leases."""
    profile = EngineProfile(decode_base=0.05, transfer_latency=600, lease=600, num_blocks=64)
    with Fleet(profile=profile) as running:
        yield running


@pytest.fixture(scope="module")
def short_lease() -> Any:
    decode = ["--load-fail-policy=recompute", "--load-fail-delay=0"]
    with Fleet(profile=EngineProfile(lease=0.1), decode_arguments=decode) as running:
        yield running


async def test_an_expired_lease_gives_wrong_text(short_lease: Fleet, client: Client) -> None:
    p = short_lease["prefill-0"]
    params = await client.prefill(p, BODY)

    async def expired() -> bool:
        return (await client.stats(p))["pinned"] == 0

    await until(expired)
    assert await client.metric(p, "vllm:nixl_num_kv_expired_reqs_total") == 1
    body = {**BODY, "max_tokens": 2}
    assert await client.text(short_lease["decode-0"], body, params) != await client.text(p, body)


async def test_recompute_when_the_sender_is_unknown(short_lease: Fleet, client: Client) -> None:
    p, d = short_lease["prefill-0"], short_lease["decode-0"]
    params = await client.prefill(p, BODY)
    params["remote_port"] = 1
    body = {**BODY, "max_tokens": 2}
    assert await client.text(d, body, params) == await client.text(p, body)
    assert (await client.last(d))["outcomes"] == ["recomputed"]


async def test_a_client_that_leaves_frees_all(slow: Fleet, client: Client) -> None:
    p, d = slow["prefill-0"], slow["decode-0"]
    params = await client.prefill(p, BODY)
    body = {**BODY, "kv_transfer_params": params}
    request = asyncio.create_task(client.post(d, COMPLETIONS, body))

    async def deferred() -> bool:
        return await client.metric(d, "vllm:num_requests_waiting_by_reason", 'reason="deferred"') == 1

    async def free() -> bool:
        return all([(await client.stats(each))["blocks_used"] == 0 for each in (p, d)])

    await until(deferred)
    request.cancel()
    await until(free)
    assert (await client.stats(p))["hand_offs"]["released"] == 1
    assert await client.metric(d, "vllm:request_success_total", 'finished_reason="abort"') == 1


async def test_requests_wait_for_room(slow: Fleet, client: Client) -> None:
    d = slow["decode-0"]

    def ask(name: str, max_tokens: int) -> asyncio.Task[str]:
        body = {"prompt": name * 4 * 700, "max_tokens": max_tokens, "ignore_eos": True}
        return asyncio.create_task(Client(client.session).text(d, body))

    async def running() -> bool:
        return await client.metric(d, "vllm:num_requests_running") == 1

    async def waiting() -> bool:
        return await client.metric(d, "vllm:num_requests_waiting_by_reason", 'reason="capacity"') == 2

    first = ask("x", 300)
    await until(running)
    others = [ask(name, 4) for name in "yz"]
    await until(waiting)
    assert await client.metric(d, "vllm:kv_cache_usage_perc") > 0.6
    assert await client.get(d, "/load") == {"server_load": 3}
    assert not first.done()
    first.cancel()
    assert len(set(await asyncio.gather(*others))) == 2


async def test_sigterm_ends_a_busy_server_at_once(slow: Fleet, client: Client) -> None:
    p = slow["prefill-0"]
    request = asyncio.create_task(
        client.post(p, COMPLETIONS, {**BODY, "max_tokens": 500, "ignore_eos": True})
    )

    async def running() -> bool:
        return (await client.stats(p))["running"] == 1

    await until(running)
    slow.kill("prefill-0", signal.SIGTERM)
    assert await asyncio.to_thread(p.process.wait, HUNG_S) == 0
    with pytest.raises(aiohttp.ClientError):  # cut, not waited for
        await request
    assert "Traceback" not in p.output()
    slow.restart("prefill-0")


async def test_api_key_and_no_connector(client: Client) -> None:
    arguments = ["--api-key=secret", "--kv-connector=none", "--instant"]
    with Fleet(1, 0, arguments=arguments) as fleet:
        p = fleet["prefill-0"]
        answer = await client.post(p, COMPLETIONS, BODY)
        assert (client.status, answer) == (401, {"error": "Unauthorized"})
        for path in ("/health", "/metrics", "/version", "/load", "/ping"):
            await client.get(p, path)
            assert client.status == 200
        params = {"kv_transfer_params": {"do_remote_prefill": True}}
        answer = await client.post(p, COMPLETIONS, {**BODY, **params}, Authorization="Bearer secret")
        assert (client.status, answer["kv_transfer_params"]) == (200, None)


async def test_an_engine_that_returns_under_its_old_id_is_not_recognised(client: Client) -> None:
    arguments = ["--instant", "--load-fail-delay=0"]
    with Fleet(1, 1, arguments=arguments, prefill_arguments=["--engine-id=fixed"]) as fleet:
        p, d = fleet.instances
        good = await client.text(d, BODY, await client.prefill(p, BODY))
        await asyncio.to_thread(fleet.restart, "prefill-0")
        params = await client.prefill(p, BODY)
        await client.post(d, COMPLETIONS, {**BODY, "kv_transfer_params": params})
        assert client.status == 500
        assert await client.text(p, BODY) == good
        assert [each.output().count("\n") for each in (p, d)] == [2, 1]  # one line a start, and nothing else
