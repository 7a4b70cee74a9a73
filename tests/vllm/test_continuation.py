"""Streams of real vLLM whose connection is cut: greedy texts that went on are those of unbroken ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import Stack, spawned, unused_ports
from tests.support.real_vllm import AGGREGATED, MODEL, Pair, completion, ready

pytestmark = pytest.mark.vllm

STREAMS = 100
AT_ONCE = 4
TOKENS = 40
CONTINUE = {"x-pd-continue": "true"}


class Cutting:
    """A proxy that ends a connection after so many events of a stream, once for each number in ``after``.

    A stream is cut once, by its ``x-request-id``: its rest is left alone.
    """

    def __init__(self, target: int, cut_already: set[bytes]) -> None:
        self._target = target
        self._cut_already = cut_already
        self.after: list[int] = []
        self.cuts = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        asked = [b""]
        sending = asyncio.ensure_future(_copy(reader, back, asked))
        events, after, name = 0, None, b""
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await there.read(1 << 16):
                if b"text/event-stream" in data:
                    name = asked[-1].partition(b"x-request-id: ")[2].partition(b"\r\n")[0]
                    spared = name in self._cut_already or not self.after
                    events, after = 0, None if spared else self.after.pop()
                    asked[:] = [b""]
                events += data.count(b"\n\ndata: ") + data.count(b"\r\ndata: ")
                if after is not None and events > after:
                    self.cuts += 1
                    self._cut_already.add(name)
                    back.transport.abort()
                    writer.transport.abort()
                    break
                writer.write(data)
        writer.close()
        back.close()
        sending.cancel()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[bytes]) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            asked[-1] += data
            writer.write(data)
        writer.close()


@asynccontextmanager
async def cutting(port: int, target: int, cut_already: set[bytes]) -> AsyncIterator[Cutting]:
    made = Cutting(target, cut_already)
    async with await asyncio.start_server(made.connected, "127.0.0.1", port):
        yield made


@pytest.fixture
def ports() -> tuple[int, int, int]:
    one, two, three = unused_ports(3)
    return one, two, three


@pytest.fixture
def stack(pair: Pair, tmp_path: Path, ports: tuple[int, int, int]) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    decode = [{"id": f"d{n}", "host": "127.0.0.1", "port": port} for n, port in enumerate(ports[:2])]
    config = {
        "strategy": "round_robin",
        "prefill_instances": [pair.prefill.entry("p")],
        "decode_instances": decode,
        "continuation_port": ports[2],
        "ejection_failures": 1_000_000,
        "ejection_success_rate": 0.0,
        "max_ejected_share": 0.0,
    }
    with spawned(stack.up(config)):
        yield stack


def request(number: int) -> tuple[str, dict[str, Any]]:
    body = completion(f"story-{number}", max_tokens=TOKENS, stream=True, model=MODEL)
    body["stream_options"] = {"include_usage": True}
    if number % 2:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        return "/v1/chat/completions", body
    return "/v1/completions", body


async def read(
    session: aiohttp.ClientSession, url: str, number: int, headers: dict[str, str]
) -> tuple[str, int | None]:
    """Return the text and the number of tokens of an answer, none if it was cut."""
    path, body = request(number)
    text, tokens, done = "", None, False
    try:
        async with session.post(url + path, json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                done = done or line.startswith(b"data: [DONE]")
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except aiohttp.ClientError:
        return text, None
    return text, tokens if done else None


async def test_what_goes_on_is_what_an_unbroken_stream_says(
    stack: Stack, pair: Pair, ports: tuple[int, int, int]
) -> None:
    one, two, _ = ports
    timeout = aiohttp.ClientTimeout(total=200)
    cut_already: set[bytes] = set()
    async with (
        cutting(one, pair.decode.port, cut_already) as first,
        cutting(two, int(AGGREGATED.rsplit(":", 1)[1]), cut_already) as second,
        aiohttp.ClientSession(timeout=timeout) as session,
    ):
        await ready(stack)
        free = asyncio.Semaphore(AT_ONCE)

        async def both(number: int) -> tuple[str, int | None, str, int | None]:
            async with free:
                right = await read(session, AGGREGATED, number, {})
                (first, second)[number % 2].after.append(number % TOKENS)
                found = await read(session, stack.url, number, CONTINUE)
                return *found, *right

        results = await asyncio.gather(*(both(number) for number in range(STREAMS)))
        cut = [number for number, found in enumerate(results) if found[1] is None]
        wrong = [
            (number, found) for number, found in enumerate(results) if found[1] and found[:2] != found[2:]
        ]
        async with session.get(stack.admin + "/metrics") as response:
            page = await response.text()
        lines = [line for line in page.splitlines() if "streams_continued_total{" in line]
        print(first.cuts + second.cuts, "cuts;", len(cut), "cut streams;", lines)
        assert first.cuts + second.cuts > STREAMS / 2
        assert not wrong, wrong[:3]
        assert not cut
