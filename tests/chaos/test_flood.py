"""A flood of large bodies: the scheduler's memory stays bounded, and everybody gets an answer."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from tests.support.overload import Overload, overload
from tests.support.processes import Answer
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

MIB = 1 << 20
CLIENTS = 200
BODY = 256 << 10
LIMIT = 8 * MIB
PER_REQUEST = 100 << 10
"""What a request takes beside its body; see docs/reliability.md."""
LONG = ["--instant", "--max-model-len=100000", "--num-blocks=600000"]


def memory(pid: int, what: str = "VmRSS") -> int:
    """Return the resident bytes of a process, or with ``VmHWM`` the most that it had since ``reset_peak``."""
    (kib,) = re.findall(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kib) << 10


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def prompt(number: int) -> str:
    return f"{number:06} " + "word " * (BODY // 5)


async def flood(load: Overload) -> list[Answer]:
    """Send large bodies while no prefill instance answers, until those without room are refused."""
    with load.held("prefill-0", "prefill-1"):
        tasks = [load.ask(prompt(number), max_tokens=2) for number in range(CLIENTS)]

        async def refused() -> bool:
            return sum(task.done() for task in tasks) >= CLIENTS - LIMIT // BODY

        await until(refused)
        held = (await load.metrics())["pd_scheduler_held_bytes"]
        assert LIMIT - BODY * 1.1 < held <= LIMIT
    return await asyncio.gather(*tasks)


async def test_memory_is_bounded(tmp_path: Path) -> None:
    """The bound of docs/reliability.md, and most of it is given back, flood after flood."""
    with Fleet(2, 1, arguments=LONG) as fleet:
        settings = {"max_held_bytes": LIMIT, "max_body_bytes": MIB, "prefill_timeout": 60.0}
        async with overload(fleet, tmp_path, **settings) as (load, process):
            pid = process.process.pid
            assert (await load.ask("the first")).status == 200
            before, after = memory(pid), []
            for _ in range(2):
                reset_peak(pid)
                answers = await flood(load)
                seen = Counter((answer.status, answer.headers.get("x-pd-reason")) for answer in answers)
                assert set(seen) == {(200, None), (429, "memory")}
                assert seen[200, None] == LIMIT // BODY - 1, "the last one's place is not quite large enough"
                assert memory(pid, "VmHWM") < before + 3 * LIMIT + CLIENTS * PER_REQUEST
                await load.client.until_in_flight(0)
                after.append(memory(pid))
            assert (await load.metrics())["pd_scheduler_held_bytes"] == 0
            assert max(after) < before + LIMIT + CLIENTS * PER_REQUEST


async def test_chunked_bodies_are_counted_too(tmp_path: Path) -> None:
    """They come to the scheduler with a length, like all others, and only when they are whole."""
    with Fleet(2, 1, arguments=LONG) as fleet:
        async with overload(fleet, tmp_path, max_body_bytes=MIB) as (load, _):
            url = load.client.stack.url + "/v1/completions"
            begun = asyncio.Event()

            async def never_ends() -> AsyncIterator[bytes]:
                yield b'{"prompt": "'
                begun.set()
                await asyncio.sleep(3600)

            async def too_large() -> AsyncIterator[bytes]:
                yield b'{"prompt": "' + b"a" * (2 * MIB)
                yield b"a" * (2 * MIB) + b'"}'

            slow = asyncio.ensure_future(load.client.session.post(url, data=never_ends()))
            await begun.wait()
            assert (await load.ask("not held up by the slow one")).status == 200
            assert (await load.metrics())["pd_scheduler_held_bytes"] == 0
            async with load.client.session.post(url, data=too_large()) as response:
                assert (response.status, response.headers["x-pd-reason"]) == (413, "too_large")
            slow.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await slow


async def test_bodies_are_not_kept_while_their_answers_run(tmp_path: Path) -> None:
    requests = 40
    with Fleet(1, 1, arguments=[*LONG, "--decode-base=0.05"]) as fleet:
        async with overload(fleet, tmp_path, max_held_bytes=LIMIT) as (load, process):
            pid = process.process.pid
            before = memory(pid)
            url = load.client.stack.url + "/v1/completions"
            async with contextlib.AsyncExitStack() as answers:
                for number in range(requests):
                    body = {
                        "prompt": prompt(number),
                        "max_tokens": 10_000,
                        "stream": True,
                        "ignore_eos": True,
                    }
                    sent: contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]
                    sent = load.client.session.post(url, json=body)
                    assert (await answers.enter_async_context(sent)).status == 200
                assert await load.client.in_flight() == requests
                assert (await load.metrics())["pd_scheduler_held_bytes"] == 0
                assert memory(pid) < before + requests * BODY
