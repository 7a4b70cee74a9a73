"""Whatever clients send, they get an answer, and nobody behind is harmed.

``FUZZ_REQUESTS`` says how many requests, ``FUZZ_SEED`` which: request 17 of a seed is always the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from typing import Any

import psutil

from tests.support.hostile_requests import HANDOFF, Request, request
from tests.support.processes import Answer, Client, Process
from tests.support.waiting import HUNG_S

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "1000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
CONCURRENCY = 16
BATCH = 48
"""Requests between two looks at the instances, which remember their last 200."""
GROWTH_BYTES = 48 << 20
"""How much more memory scheduler and Envoy may each hold afterwards than after the first requests."""


async def test_fuzz(client: Client, up: Process) -> None:
    seen = await client.seen_by_all(releases=True)
    scheduler = psutil.Process(up.process.pid)
    memory: dict[psutil.Process, int] = {}
    statuses: dict[int, int] = {}
    for start in range(0, REQUESTS, BATCH):
        numbers = range(start, min(start + BATCH, REQUESTS))
        for status in await _send_all(client, numbers):
            statuses[status] = statuses.get(status, 0) + 1
        seen = await _check_instances(client, seen, numbers)
        if not memory and start >= REQUESTS // 4:
            memory = {each: each.memory_info().rss for each in (scheduler, *scheduler.children())}

    await client.until_in_flight(0)
    assert "Traceback" not in up.output, up.output[-20_000:]
    assert " ERROR " not in up.output
    growth = {process.name(): process.memory_info().rss - before for process, before in memory.items()}
    assert max(growth.values()) < GROWTH_BYTES, growth
    assert (await client.complete()).headers["x-pd-prefill"]
    assert statuses.keys() >= {200, 400, 404}, statuses
    print(f"{REQUESTS} requests of seed {SEED}: {dict(sorted(statuses.items()))}, memory {growth}")


async def _send_all(client: Client, numbers: range) -> list[int]:
    free = asyncio.Semaphore(CONCURRENCY)

    async def one(number: int) -> int:
        made = request(SEED, number)
        async with free:
            try:
                answer = await asyncio.wait_for(_send(client, made), HUNG_S)
                _check(answer)
            except (AssertionError, TimeoutError, OSError, EOFError, ValueError) as error:
                error.add_note(f"request {number} of seed {SEED}: {made.data[:2000]!r}")
                raise
            return answer.status

    return await asyncio.gather(*map(one, numbers))


async def _send(client: Client, made: Request) -> Answer:
    """Send a request on a connection of its own and read the answer as it is framed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.stack.ports.ingress, limit=1 << 20)
    try:
        writer.write(made.data)
        status = 100
        while status < 200:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        if made.method == "HEAD" or status in (204, 304):
            return Answer(status, headers, b"")
        return Answer(status, headers, await _body(reader, headers))
    finally:
        writer.transport.abort()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    assert headers["transfer-encoding"] == "chunked", headers
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    return body


def _check(answer: Answer) -> None:
    """No failure of ours, and an error that clients can read unless it is an instance's own."""
    assert 200 <= answer.status < 600
    assert answer.status not in (500, 502, 503, 504), answer
    if answer.status >= 400 and "x-pd-decode" not in answer.headers and answer.body:
        assert answer.error["message"].strip()


async def _check_instances(client: Client, before: dict[str, int], numbers: range) -> dict[str, int]:
    """All live, and none was sent a hand-off that is not ours; return what each has been sent so far."""
    last = dict(before)
    for instance in client.fleet.instances:
        assert instance.alive, f"requests {numbers} of seed {SEED} ended {instance.id}:\n{instance.output()}"
        new = await client.seen_since(instance.id, before[instance.id], releases=True)
        for entry in new:
            shown = {**entry, "body": entry["body"][:2000]}
            assert _is_clean(entry["body"], entry["body_bytes"]), f"{numbers} of seed {SEED}: {shown}"
            last[instance.id] = entry["number"]
        assert len(new) == last[instance.id] - before[instance.id], "the journal was too short"
    return last


OURS = {"do_remote_decode", "do_remote_prefill", "remote_engine_id", "remote_block_ids", "remote_host"}


def _is_clean(body: str, size: int) -> bool:
    """Whether the only hand-off in a body, if there is one, is at the top and not a client's.

    Of a long body only the beginning is known, where ours never is.
    """
    found: list[Any] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.extend(value for name, value in pairs if name == HANDOFF)
        return dict(pairs)

    try:
        document = json.loads(body.removeprefix("\ufeff"), object_pairs_hook=members, parse_int=str)
    except ValueError:
        unescaped = re.sub(r"\\u00([0-7][0-9a-fA-F])", lambda match: chr(int(match[1], 16)), body)
        if size > len(body.encode("utf-8", "surrogateescape")):
            return re.search(rf'(?<!\\)"{HANDOFF}"\s*:', unescaped) is None
        return HANDOFF not in unescaped
    if not found:
        return True
    (ours,) = found
    return document.get(HANDOFF) is ours and ours.keys() >= OURS and "evil" not in str(ours)
