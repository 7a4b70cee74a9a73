"""A load at a fixed rate while instances are killed, hung, drained and restarted at random, in each protocol.

``SOAK_SECONDS`` and ``SOAK_RATE`` (requests a second) set its size; the suite has short ones.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass

import aiohttp
import psutil
import pytest

from tests.support.connectors import PROTOCOLS, WAITS_FOR_THE_DEAD
from tests.support.processes import Client, Process, Stack, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
RATE = float(os.environ.get("SOAK_RATE", "60"))
SHORT_S = dict.fromkeys(PROTOCOLS, 3.0) | {"nixl": 7.0}
HANGS_S = 8.0
"""How long a client waits where a stream may never go on."""
STREAMS_OF_A_D = 16
"""More than are under way at one at a time."""
LEFT_IF_D_HAS_ALL = {"nixl-push"}
"""Where a D that has the whole prompt cached tells P nothing, which keeps its blocks until its lease ends."""
ALSO = {"sglang": {"status 503: No prefill instance has taken this request.", "error event"}}
"""What clients see besides where D cannot prefill: if two P have failed a request, and if D has told of it
before the scheduler knew."""
MAX_GROWTH = 64 << 20
"""What the scheduler's RSS may grow by after the first part of the run, in bytes."""

PROMPTS = [f"Prompt {number} of the soak: where does the cache go?" for number in range(32)]


@pytest.fixture
def settings() -> dict[str, object]:
    limits = {"decode_first_byte_timeout": 2.0, "prefill_timeout": 2.0, "health_check_timeout": 1.0}
    return {"metaserver_port": unused_ports(1)[0], **limits}


async def _disturb(client: Client, chance: random.Random, end: float, done: Counter[str]) -> None:
    """One fault after another, each on one instance and each undone before the next."""
    ids = {each.id: each.id for each in client.fleet.instances}
    while time.monotonic() < end:
        role = chance.choice(("prefill", "decode"))
        name = f"{role}-{chance.randrange(2)}"
        what = chance.choice(("kill", "hang", "drain", "fail", "replace"))
        done[what] += 1
        if what == "kill":
            client.fleet.kill(name)
            await asyncio.sleep(chance.uniform(0.1, 2.0))
            await asyncio.to_thread(client.fleet.restart, name)
        elif what == "hang":
            client.fleet.kill(name, signal.SIGSTOP)
            await asyncio.sleep(chance.uniform(0.1, 3.0))
            client.fleet.kill(name, signal.SIGCONT)
        elif what == "drain":
            await client.admin("POST", f"/instances/{ids[name]}/drain?force=true")
            await asyncio.sleep(chance.uniform(0.1, 1.0))
            await client.admin("POST", f"/instances/{ids[name]}/undrain")
        elif what == "replace":
            old, ids[name] = ids[name], f"{name}-{done[what]}"
            done["cut there"] += await _replace(client, name, old, ids[name])
        else:
            await client.fault(name, status=chance.choice((500, 503)))
            await asyncio.sleep(chance.uniform(0.1, 1.0))
            await client.fault(name)
        await until(lambda: _all_healthy(client))


async def _replace(client: Client, name: str, old: str, new: str) -> int:
    """Take an instance out as an operator does, and add it under another id.

    Return how many streams it has cut: with the instance, its metrics go.
    """
    status, answer = await client.admin("POST", f"/instances/{old}/drain?wait=true&force=true")
    assert status == 200, answer
    cuts = (await _cuts(client)).get(old, 0)
    status, answer = await client.admin("DELETE", f"/instances/{old}?force=true")
    assert status == 204, answer
    role = client.fleet[name].role
    (entry,) = [each for each in client.fleet.config()[f"{role}_instances"] if each["id"] == name]
    added = {**entry, "id": new, "role": role}
    status, answer = await client.admin("POST", "/instances", added)
    assert status == 201, answer
    return cuts


async def _cuts(client: Client) -> dict[str, int]:
    """Return the streams that were cut, by D."""
    _, page = await client.admin("GET", "/metrics")
    found = re.findall(r'_total{decode="([^"]*)",failure="cut"} (\S+)', page)
    return {name: int(float(count)) for name, count in found}


async def _all_healthy(client: Client) -> bool:
    return set((await client.states()).values()) == {"healthy"}


@dataclass(frozen=True)
class Left:
    """What the hand-offs that nobody has used have left behind."""

    pinned: int
    """Blocks that P keep now."""
    expired: int
    """Hand-offs that P have kept until their leases ended."""
    stranded: float
    """Those that the scheduler could not free."""


async def _left(client: Client) -> Left:
    stats = [await client.json(each.url + "/_sim/stats") for each in client.fleet.prefill]
    _, page = await client.admin("GET", "/metrics")
    stranded = re.findall(r'handoffs_unused_total{outcome="stranded".*} (\S+)', page)
    return Left(
        sum(each["pinned"] for each in stats),
        sum(each["hand_offs"].get("expired", 0) for each in stats),
        sum(map(float, stranded)),
    )


@pytest.mark.parametrize("fleet", PROTOCOLS, indirect=True, scope="module")
async def test_soak(
    client: Client, fleet: Fleet, stack: Stack, scheduler_and_envoy: tuple[Process, Process]
) -> None:
    seconds = SECONDS or SHORT_S[fleet.connector]
    waits = fleet.connector in WAITS_FOR_THE_DEAD
    chance = random.Random(f"20261122 {fleet.connector}")
    body = {"max_tokens": 8, "ignore_eos": True}
    expected = [(await client.complete(**body, prompt=prompt)).text for prompt in PROMPTS]
    results: Counter[str] = Counter()
    done: Counter[str] = Counter()

    async def one(number: int) -> None:
        stream = number % 2 == 0
        try:
            async with asyncio.timeout(HANGS_S if waits and stream else None):
                answer = await client.complete(**body, prompt=PROMPTS[number % 32], stream=stream)
        except aiohttp.ClientPayloadError:
            results["cut"] += 1  # a stream whose decode instance died
            return
        except TimeoutError:
            results["hung"] += 1  # a stream whose prefill instance died
            return
        except aiohttp.ClientError as error:
            results[f"{type(error).__name__}: {error}"] += 1
            return
        if answer.status != 200:
            results[f"status {answer.status}: {answer.error['message'][:120]}"] += 1
        elif stream and "error" in answer.events[-1]:
            results["error event"] += 1
        elif stream and answer.events[-1] != "[DONE]":
            results["ended as if complete"] += 1
        else:
            results["ok" if answer.text == expected[number % 32] else "wrong text"] += 1

    scheduler = psutil.Process(scheduler_and_envoy[0].process.pid)
    start = time.monotonic()
    disturbing = asyncio.ensure_future(_disturb(client, chance, start + seconds, done))
    requests: set[asyncio.Task[None]] = set()
    baseline = number = 0
    while time.monotonic() < start + seconds:
        requests.add(task := asyncio.ensure_future(one(number)))
        task.add_done_callback(requests.discard)
        number += 1
        if time.monotonic() < start + seconds / 4:
            baseline = scheduler.memory_info().rss
        await asyncio.sleep(max(0.0, start + number / RATE - time.monotonic()))
    await asyncio.gather(disturbing, *requests)

    await client.until_in_flight(0)
    grown = scheduler.memory_info().rss - baseline
    left = await _left(client)
    print(
        f"{fleet.connector}: {number} requests, {dict(results)}, faults {dict(done)}, {left}, "
        f"RSS grew by {grown / 2**20:.1f} MiB"
    )
    also = {"hung"} if waits else ALSO.get(fleet.connector, set())
    assert set(results) <= {"ok", "cut"} | also, results
    assert sum(results.values()) == number
    cuts = sum((await _cuts(client)).values()) + done["cut there"]
    assert results["cut"] <= cuts, "each was counted"
    assert results["ok"] >= 0.98 * number - STREAMS_OF_A_D
    _, page = await client.admin("GET", "/metrics")
    named = set(re.findall(r'(?:instance|prefill|decode)="([^"]*)"', page))
    assert named == set(await client.states()), "what is gone has no series"
    if fleet.connector not in LEFT_IF_D_HAS_ALL:
        broken = done["kill"] + done["hang"] + done["replace"]
        assert left.pinned + left.expired <= STREAMS_OF_A_D * broken, "a D that has begun may have fetched"
    assert grown < MAX_GROWTH
    assert "Traceback" not in scheduler_and_envoy[0].output
