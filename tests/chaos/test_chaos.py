"""One test for each row of the table in docs/reliability.md."""

from __future__ import annotations

import signal

import aiohttp
import pytest

from tests.support.connectors import WAITS_FOR_THE_DEAD
from tests.support.load import load
from tests.support.processes import Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

KEEP_HANDOFFS = ["nixl", "mooncake", "ascend-mooncake", "moriio-write", "offloading-p2p"]
each_connector = pytest.mark.parametrize(
    "fleet", [*KEEP_HANDOFFS, "ascend-layerwise"], indirect=True, scope="module"
)
each_that_keeps_handoffs = pytest.mark.parametrize("fleet", KEEP_HANDOFFS, indirect=True, scope="module")
ENDS_WITH_A_P_THAT_HANGS = {"ascend-layerwise"}
LONG_STREAM = {"prompt": "p", "max_tokens": 300, "ignore_eos": True, "stream": True}


async def _metric(client: Client, line: str) -> float:
    _, page = await client.admin("GET", "/metrics")
    return sum(float(each.rsplit(" ", 1)[1]) for each in page.splitlines() if each.startswith(line))


async def _serving_again(client: Client, header: str, name: str) -> None:
    async def serving() -> bool:
        answer = await client.complete()
        served = await client.prefilled_by(answer) if header == "x-pd-prefill" else answer.headers.get(header)
        return served == name

    await until(serving)


@each_connector
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_killed_instance(client: Client, role: str, stream: bool) -> None:
    """Nobody notices, but a stream that the killed decode instance was writing; it serves again."""
    victim = f"{role}-1"
    async with load(client, stream=stream) as seen:
        await seen.more()
        client.fleet.kill(victim)
        await seen.more(50)
        client.fleet.restart(victim)
        await _serving_again(client, f"x-pd-{role}", victim)
    if stream and role == "decode":
        cut = await _metric(
            client, f'pd_scheduler_decode_attempt_failures_total{{decode="{victim}",failure="cut"}}'
        )
        assert set(seen.errors) <= {"ClientPayloadError"}, "cut, never ended as if complete"
        assert sum(seen.errors.values()) == cut
        assert not seen.wrong
    elif stream and client.fleet.connector in WAITS_FOR_THE_DEAD:
        # D has sent its headers and waits for a P that is gone, so Envoy cuts the stream, long after this.
        assert set(seen.errors) <= {"TimeoutError"}
        assert not seen.wrong
    else:
        seen.assert_clean()


@each_connector
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_hung_instance(client: Client, role: str) -> None:
    """SIGSTOP: those who wait there get an answer from another one when the limit (1 s here) is over."""
    victim = f"{role}-1"
    timeouts = {
        "prefill": f'pd_scheduler_prefill_failures_total{{prefill="{victim}",reason="timeout"}}',
        "decode": f'pd_scheduler_decode_attempt_failures_total{{decode="{victim}",failure="timeout"}}',
    }[role]
    async with load(client, stream=True) as seen:
        await seen.more()

        async def avoided() -> bool:
            return (await client.states())[victim] == "unhealthy"

        async def waited_for() -> bool:
            return await _metric(client, timeouts) > 0

        with client.frozen(victim):
            await until(avoided)
            await until(waited_for)
            await seen.more(50)
        await _serving_again(client, f"x-pd-{role}", victim)
    if role == "prefill" and client.fleet.connector not in ENDS_WITH_A_P_THAT_HANGS:
        seen.assert_clean()
    assert set(seen.errors) <= {"ClientPayloadError", "TimeoutError"}
    assert not seen.wrong


async def test_killed_scheduler(
    stack: Stack,
    client: Client,
    fleet: Fleet,
    settings: dict[str, object],
    scheduler_and_envoy: tuple[Process, Process],
) -> None:
    """No client sees an error, running streams go on, and P/D resumes by itself."""
    scheduler, _ = scheduler_and_envoy
    url = stack.url + "/v1/completions"
    async with load(client) as seen, client.session.post(url, json=LONG_STREAM) as response:
        await response.content.readline()
        scheduler.signal(signal.SIGKILL)
        scheduler.wait()
        await seen.more(50)
        with spawned(stack.serve({**settings, **fleet.config()})):
            await client.until_split()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
            await seen.more()
    seen.assert_clean()


async def test_hung_scheduler(client: Client, scheduler_and_envoy: tuple[Process, Process]) -> None:
    """Envoy's keepalive finds out; requests that wait for it go on without it, while it hangs."""
    scheduler, _ = scheduler_and_envoy
    async with load(client) as seen:
        await seen.more()
        scheduler.signal(signal.SIGSTOP)
        try:
            await seen.more(50)
        finally:
            scheduler.signal(signal.SIGCONT)
    seen.assert_clean()


async def test_a_stream_that_is_cut_is_an_error_and_counted(client: Client, stack: Stack) -> None:
    async with client.session.post(stack.url + "/v1/completions", json=LONG_STREAM) as response:
        await response.content.readline()
        name = response.headers["x-pd-decode"]
        client.fleet.kill(name)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    line = f'pd_scheduler_decode_attempt_failures_total{{decode="{name}",failure="cut"}}'

    async def counted() -> bool:
        return await _metric(client, line) == 1

    await until(counted)


@each_that_keeps_handoffs
@pytest.mark.parametrize("settings", [{"health_check_interval": 3600.0}], indirect=True, ids=["unprobed"])
@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}, "killed"])
async def test_a_hand_off_that_nobody_fetches_is_freed(client: Client, fault: object) -> None:
    """D fails before it fetched: P's blocks are given back, not left to the lease (30 s)."""
    if isinstance(fault, dict):
        await client.fault("decode-0", **fault)
    else:
        client.fleet.kill("decode-0")
    answers = [await client.complete(prompt="word " * 400) for _ in range(2)]
    assert {answer.status for answer in answers} == {200}
    rescued = [answer for answer in answers if "x-pd-prefill" not in answer.headers]
    assert len(rescued) == 1, "round robin starts at decode-0 once"

    await client.until_freed()

    async def counted() -> bool:
        return await _metric(client, "pd_scheduler_handoffs_unused_total{") == 1

    await until(counted)


async def test_an_instance_that_fails_is_ejected_and_returns(client: Client) -> None:
    """Its /health is fine, its answers are 500: after three in a row it is left out, then tried again."""
    await client.fault("decode-1", status=500)

    async def ejected() -> bool:
        assert (await client.complete()).status == 200
        return (await client.instance("decode-1"))["reason"] == "ejected: decode: status"

    await until(ejected)
    await client.fault("decode-1")
    await _serving_again(client, "x-pd-decode", "decode-1")


async def test_never_more_than_half_of_a_role_is_ejected(client: Client) -> None:
    for instance in client.fleet.decode:
        await client.fault(instance.id, status=500, paths=["/v1/completions"])
    for _ in range(12):
        assert (await client.complete()).status in (500, 503)
    states = [state for name, state in (await client.states()).items() if name.startswith("decode")]
    assert states.count("healthy") >= 1
