"""A flood of large bodies onto prefill instances that hang: memory is bounded, everybody gets an answer."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from pathlib import Path

from tests.overload import overload
from tests.processes import until
from vllm_pd_scheduler.sim.fleet import Fleet

MIB = 1 << 20
CLIENTS = 200
BODY = 256 << 10
LIMIT = 8 * MIB


def memory(pid: int, what: str = "VmRSS") -> int:
    """Return the resident bytes of a process, or with ``VmHWM`` the most that it had since the last reset."""
    (kib,) = re.findall(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kib) << 10


async def test_a_flood(tmp_path: Path) -> None:
    arguments = ["--instant", "--max-model-len=100000"]
    with Fleet(2, 1, arguments=arguments) as fleet:
        settings = {
            "max_held_bytes": LIMIT,
            "max_body_bytes": MIB,
            "prefill_timeout": 60.0,
            "max_in_flight_tokens": 1,
        }
        async with overload(fleet, tmp_path, **settings) as (load, process):
            pid = process.process.pid
            assert (await load.client.complete()).status == 200
            before = memory(pid)
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # noqa: ASYNC240 - the peak counts from here
            with load.held("prefill-0", "prefill-1"):
                tasks = [
                    load.ask(f"{number:06} " + "word " * (BODY // 5), max_tokens=2)
                    for number in range(CLIENTS)
                ]

                async def refused() -> bool:
                    return sum(task.done() for task in tasks) + LIMIT // BODY >= CLIENTS

                await until(refused, 30)
                print(
                    "held",
                    [
                        f"{k} {v}"
                        for k, v in (await load.metrics()).items()
                        if "pd_held" in k or ("pd_queue" in k and "bucket" not in k)
                    ],
                )
                print("rss during", memory(pid) / MIB)
            answers = await asyncio.gather(*tasks)
            print(Counter((a.status, a.headers.get("x-pd-reason")) for a in answers))
            print("before", before / MIB, "peak", memory(pid, "VmHWM") / MIB, "after", memory(pid) / MIB)
            await asyncio.sleep(1)
            print("before", before / MIB, "peak", memory(pid, "VmHWM") / MIB, "after", memory(pid) / MIB)


async def test_bodies_are_not_kept_while_their_answers_run(tmp_path: Path) -> None:
    arguments = ["--instant", "--max-model-len=100000", "--num-blocks=600000", "--decode-base=0.05"]
    with Fleet(1, 1, arguments=arguments) as fleet:
        async with overload(fleet, tmp_path, max_held_bytes=LIMIT) as (load, process):
            pid = process.process.pid
            before = memory(pid)
            url = load.client.stack.url + "/v1/completions"
            async with contextlib.AsyncExitStack() as answers:
                for number in range(100):
                    body = {
                        "prompt": f"{number:06} " + "word " * (BODY // 5),
                        "max_tokens": 10000,
                        "stream": True,
                        "ignore_eos": True,
                    }
                    response = await answers.enter_async_context(load.client.session.post(url, json=body))
                    assert response.status == 200
                print("before", before / MIB, "during", memory(pid) / MIB)
                print([f"{k} {v}" for k, v in (await load.metrics()).items() if "pd_held" in k])
