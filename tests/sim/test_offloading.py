"""The P2P tier between simulated engines: copies that are fetched once, and pulled prefixes."""

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support.sim import BODY, COMPLETIONS, Client
from tests.support.sim_fleet import Fleet, SimInstance
from vllm_pd_scheduler.sim.options import parse_options
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Engines that wait for each other longer than any test does."""
    with started(2, 2, lease=300.0, wait=300.0) as running:
        yield running


@pytest.fixture(scope="module")
def brief() -> Iterator[Fleet]:
    """Engines that wait for nobody."""
    with started(1, 1, lease=0.1, wait=0.1) as running:
        yield running


def started(prefill: int, decode: int, lease: float, wait: float) -> Fleet:
    """A fleet whose P keep a copy for ``lease`` seconds, and in which one waits ``wait`` seconds for it."""
    profile = replace(EngineProfile.instant(), lease=lease)
    arguments = [f"--load-fail-delay={wait}", "--max-model-len=4096"]
    return Fleet(prefill, decode, profile=profile, arguments=arguments, connector="offloading-p2p")


async def prefill(client: Client, p: SimInstance, **more: Any) -> dict[str, Any]:
    """Return the parameters for D; P's answer has none."""
    name = uuid.uuid4().hex
    params = {"remote_decoder": {"kv_request_id": name}}
    body = {**BODY, "max_tokens": 1, "kv_transfer_params": params, **more}
    answer = await client.post(p, COMPLETIONS, body)
    assert client.status == 200, answer
    assert answer["kv_transfer_params"] is None
    at = {"kv_request_id": name, "remote_host": p.host, "remote_port": p.port}
    return {"remote_prefiller": at}


async def outcome(client: Client, d: SimInstance, params: Any, body: dict[str, Any] = BODY) -> str:
    """Return what became of a hand-off; the text is right in any case."""
    expected = await client.text(d, body)
    assert await client.text(d, body, params) == expected
    (found,) = (await client.last(d))["outcomes"]
    return str(found)


async def test_hand_off_gives_the_same_text_and_p_pins_nothing(fleet: Fleet, client: Client) -> None:
    p, d = fleet["prefill-0"], fleet["decode-0"]
    params = await prefill(client, p)
    assert (await client.stats(p))["pinned"] == (await client.stats(p))["blocks_used"] == 0
    assert await outcome(client, d, params) == "good"


async def test_a_second_fetch_waits_in_vain(fleet: Fleet, brief: Fleet, client: Client) -> None:
    p = fleet["prefill-0"]
    params = await prefill(client, p)
    assert await outcome(client, fleet["decode-0"], params) == "good"
    assert await outcome(client, brief["decode-0"], params) == "recomputed"


async def test_a_late_fetch_is_refused_at_once(fleet: Fleet, brief: Fleet, client: Client) -> None:
    params = await prefill(client, brief["prefill-0"])
    await asyncio.sleep(0.15)
    assert await outcome(client, fleet["decode-0"], params) == "recomputed"
    name = params["remote_prefiller"]["kv_request_id"]
    call = {"kv_request_id": name, "digest": ""}
    answer = await client.post(brief["prefill-0"], "/_sim/kv/p2p/fetch", call)
    assert '"late":true' in str(answer)


async def test_a_fetch_before_the_prefill_waits_for_it(fleet: Fleet, client: Client) -> None:
    p, d, name = fleet["prefill-0"], fleet["decode-0"], uuid.uuid4().hex
    at = {"kv_request_id": name, "remote_host": p.host, "remote_port": p.port}
    fetching = asyncio.ensure_future(outcome(client, d, {"remote_prefiller": at}))
    await asyncio.sleep(0.05)
    other = Client(client.session)
    params = {"remote_decoder": {"kv_request_id": name}}
    await other.post(p, COMPLETIONS, {**BODY, "max_tokens": 1, "kv_transfer_params": params})
    assert await fetching == "good"


@pytest.mark.parametrize("change", [{"kv_request_id": "nobody's"}, {"remote_port": 9}])
async def test_what_nobody_has(fleet: Fleet, brief: Fleet, client: Client, change: dict[str, Any]) -> None:
    at = (await prefill(client, fleet["prefill-0"]))["remote_prefiller"]
    assert await outcome(client, brief["decode-0"], {"remote_prefiller": {**at, **change}}) == "recomputed"


async def test_the_hand_off_of_another_prompt_is_no_wrong_text(
    fleet: Fleet, brief: Fleet, client: Client
) -> None:
    params = await prefill(client, fleet["prefill-0"], prompt="another prompt " * 40)
    assert await outcome(client, brief["decode-0"], params) == "recomputed"


async def test_what_is_not_complete_is_no_hand_off(fleet: Fleet, client: Client) -> None:
    for params in (
        {"remote_prefiller": {"kv_request_id": "x"}},
        {"remote_decoder": {}},
        {"remote_prefiller": 1},
    ):
        await client.text(fleet["decode-0"], BODY, params)
        assert (await client.last(fleet["decode-0"]))["outcomes"] == []


async def test_after_a_stop_there_is_one_too(fleet: Fleet, client: Client) -> None:
    p = fleet["prefill-0"]
    await client.post(p, "/_sim/fault", {"eos": True})
    params = await prefill(client, p)
    await client.post(p, "/_sim/fault", {})
    assert await outcome(client, fleet["decode-0"], params) == "good"


async def test_a_prefix_that_is_pulled_counts_as_cached(fleet: Fleet, client: Client) -> None:
    body = {**BODY, "prompt": "what the source has cached " * 30}
    source, p = fleet["decode-1"], fleet["prefill-1"]
    await client.text(source, body)
    at = {"kv_request_id": "s", "remote_host": source.host, "remote_port": source.port}
    params = {"remote_decoder": {"kv_request_id": "x"}, "remote_kv_source": at}
    longer = {**body, "prompt": body["prompt"] + "and what it has not " * 9, "max_tokens": 1}
    answer = await client.post(p, COMPLETIONS, {**longer, "kv_transfer_params": params})
    usage = answer["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(body["prompt"]) // 4 // 16 * 16
    assert (await client.stats(p))["hand_offs"] == {"pulled": 1}


async def test_a_source_that_is_not_there(brief: Fleet, client: Client) -> None:
    at = {"kv_request_id": "s", "remote_host": "127.0.0.1", "remote_port": 9}
    params = {"remote_decoder": {"kv_request_id": "y"}, "remote_kv_source": at}
    body = {**BODY, "prompt": "nobody has it " * 30, "max_tokens": 1}
    answer = await client.post(brief["prefill-0"], COMPLETIONS, {**body, "kv_transfer_params": params})
    assert (client.status, answer["usage"]["prompt_tokens_details"]["cached_tokens"]) == (200, 0)


def test_how_long_it_waits() -> None:
    options = parse_options(["--port=1", "--kv-connector=offloading-p2p"])
    assert (options.profile.lease, options.fail_delay) == (60.0, 30.0)
    assert parse_options(["--port=1"]).fail_delay == 0.5
