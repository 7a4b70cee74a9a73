"""Holds the simulated engine against a real prefill/decode pair: same requests, same arrivals, both measured.

The simulation's profiles are fitted to a few single requests; the comparison is made under load, which the
fit has not seen. Prints what was fitted and how far the two are apart, and draws both distributions:

    python docs/figures/compare_sim.py http://127.0.0.1:28201 http://127.0.0.1:28202 --model tiny

The engine models an instance on a machine of its own. On one machine give the processes EngineCore and Worker
of each instance a core (``taskset -acp 0 PID``), and take a model that keeps them computing: with one that is
too small, what is measured is HTTP servers that wait for a core. What is left of one instance in the other's
way, the fit has seen: decode steps are timed while prefill is busy.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from vllm_pd_scheduler.sim.engine import Engine, EngineRequest, HandOff
from vllm_pd_scheduler.sim.profile import EngineProfile
from vllm_pd_scheduler.sim.virtual import VirtualClock, VirtualInstance

SEND = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
SEND |= {"remote_block_ids": None, "remote_host": None, "remote_port": None}


@dataclass(frozen=True)
class Item:
    """A request of the workload: when it arrives, in seconds, and its lengths in tokens."""

    time: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Timing:
    """What a client sees, in seconds: of the prefill leg, to the first token, and per further token."""

    prefill: float
    ttft: float
    tpot: float


class Pair:
    """A real pair, driven as the scheduler drives it."""

    def __init__(self, session: aiohttp.ClientSession, prefill: str, decode: str, model: str) -> None:
        self._session, self._prefill, self._decode, self._model = session, prefill, decode, model
        self._random = random.Random()  # not the prompts of a run before, which are cached

    def _body(self, prompt: int) -> dict[str, Any]:
        """A request with a prompt of its own, of so many tokens."""
        ids = [self._random.randrange(300, 900) for _ in range(prompt)]
        return {"model": self._model, "prompt": ids, "ignore_eos": True, "temperature": 0}

    async def request(self, prompt: int, output: int, *, hand_off: bool = True) -> Timing:
        """Send one request with a prompt of its own, through both instances or to the decode one alone."""
        body = self._body(prompt)
        begin = between = time.monotonic()
        if hand_off:
            first = {**body, "max_tokens": 1, "kv_transfer_params": SEND}
            async with self._session.post(f"{self._prefill}/v1/completions", json=first) as response:
                body["kv_transfer_params"] = (await response.json())["kv_transfer_params"]
            between = time.monotonic()
        body |= {"max_tokens": output, "stream": True}
        tokens: list[float] = []
        async with self._session.post(f"{self._decode}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    if "error" in json.loads(line[6:]):
                        raise RuntimeError(line.decode())
                    tokens.append(time.monotonic())
        tpot = (tokens[-1] - tokens[0]) / max(1, output - 1)
        return Timing(between - begin, tokens[0] - begin, tpot)

    async def keep_prefilling(self, prompt: int) -> None:
        """Send prompts to the prefill instance, one after another, until cancelled."""
        while True:
            body = self._body(prompt) | {"max_tokens": 1}
            async with self._session.post(f"{self._prefill}/v1/completions", json=body) as response:
                await response.read()

    async def run(self, workload: Sequence[Item]) -> list[Timing]:
        """The workload, each request at its time."""
        begin = time.monotonic()

        async def one(item: Item) -> Timing:
            await asyncio.sleep(begin + item.time - time.monotonic())
            return await self.request(item.prompt, item.output)

        return await asyncio.gather(*map(one, workload))


async def fit(pair: Pair, base: EngineProfile) -> tuple[EngineProfile, EngineProfile]:
    """Profiles of the two instances, from the medians of a few requests that have the pair for themselves."""

    async def median(prompt: int, output: int, *, hand_off: bool = True, batch: int = 1) -> Timing:
        times: list[Timing] = []
        for _ in range(7):
            calls = (pair.request(prompt, output, hand_off=hand_off) for _ in range(batch))
            times += await asyncio.gather(*calls)
        pick = statistics.median
        return Timing(*(pick(getattr(t, key) for t in times) for key in ("prefill", "ttft", "tpot")))

    small, middle, large = 64, 1024, 1984
    await median(small, 8)
    short, medium, long = await median(small, 2), await median(middle, 2), await median(large, 2)
    busy = asyncio.create_task(pair.keep_prefilling(large))
    one = await median(small, 64, hand_off=False)
    eight = await median(small, 64, hand_off=False, batch=8)
    far = await median(large, 64, hand_off=False)
    busy.cancel()
    await asyncio.wait([busy])
    # seconds(n) = overhead + per_token n + per_pair n^2 / 2, through three points
    first = (medium.prefill - short.prefill) / (middle - small)
    second = (long.prefill - medium.prefill) / (large - middle)
    per_pair = max(0.0, 2 * (second - first) / (large - small))
    per_token = (long.prefill - short.prefill) / (large - small) - per_pair * (large + small) / 2
    per_seq = max(0.0, (eight.tpot - one.tpot) / 7)
    per_kv = max(0.0, (far.tpot - one.tpot) / (large - small))
    travel = [timing.ttft - timing.prefill - one.tpot for timing in (short, long)]
    per_byte = max(1e-12, (travel[1] - travel[0]) / (large - small) / base.kv_bytes_per_token)
    prefill = replace(
        base,
        step_overhead=max(0.0, short.prefill - small * per_token - per_pair * small**2 / 2),
        prefill_rate=1 / per_token,
        prefill_per_kv_token=per_pair,
    )
    decode = replace(
        base,
        step_overhead=0.0,
        prefill_rate=1 / per_token,
        prefill_per_kv_token=per_pair,
        decode_base=one.tpot - per_seq - small * per_kv,
        decode_per_seq=per_seq,
        decode_per_kv_token=per_kv,
        transfer_bandwidth=1 / per_byte,
        transfer_latency=max(0.0, travel[0] - small * base.kv_bytes_per_token * per_byte),
    )
    return prefill, decode


def simulate(workload: Sequence[Item], prefill: EngineProfile, decode: EngineProfile) -> list[Timing]:
    """The same workload in virtual time."""
    clock = VirtualClock()
    p, d = VirtualInstance(Engine(prefill), clock), VirtualInstance(Engine(decode), clock)
    timings: dict[int, Timing] = {}

    def arrive(number: int, item: Item) -> None:
        def prefilled(request: EngineRequest, end: float) -> None:
            def finished(request: EngineRequest, last: float) -> None:
                first = request.first_token or 0.0
                tpot = (last - first) / max(1, item.output - 1)
                timings[number] = Timing(end - item.time, first - item.time, tpot)

            second = EngineRequest(f"{number}", item.prompt, item.output, HandOff.RECEIVE)
            d.add(second, offer=p.offer(request.request_id), on_finished=finished)

        p.add(EngineRequest(f"{number}", item.prompt, 1, HandOff.SEND), on_finished=prefilled)

    for number, item in enumerate(workload):
        clock.call_at(item.time, lambda number=number, item=item: arrive(number, item))
    clock.run()
    return [timings[number] for number in range(len(workload))]


def make_workload(count: int, rate: float, seed: int) -> list[Item]:
    """Poisson arrivals; prompts of 32 to 2,000 tokens, most of them short; answers of 8 to 96."""
    draw, now, items = random.Random(seed), 0.0, list[Item]()
    for _ in range(count):
        now += draw.expovariate(rate)
        items.append(Item(now, int(32 * 62 ** draw.random()), draw.randint(8, 96)))
    return items


def distance(one: Sequence[float], two: Sequence[float]) -> float:
    """The Kolmogorov-Smirnov distance: the most that the two distribution functions differ."""
    return max(
        abs(sum(x <= at for x in one) / len(one) - sum(x <= at for x in two) / len(two))
        for at in (*one, *two)
    )


def report(real: Sequence[Timing], simulated: Sequence[Timing], path: Path) -> None:
    """Print the distances and draw the distributions."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (key, name) in zip(
        axes, (("ttft", "time to first token"), ("tpot", "time per token")), strict=True
    ):
        columns = [sorted(getattr(timing, key) for timing in side) for side in (real, simulated)]
        ks = distance(*columns)
        middle, high = ([column[int(len(column) * share)] for column in columns] for share in (0.5, 0.9))
        print(
            f"{key}: KS {ks:.2f}; real p50 {1e3 * middle[0]:.1f} ms, p90 {1e3 * high[0]:.1f} ms;"
            f" simulated/real p50 {middle[1] / middle[0]:.2f}, p90 {high[1] / high[0]:.2f}"
        )
        shares = [(number + 1) / len(real) for number in range(len(real))]
        for column, label in zip(columns, ("vLLM", "simulated"), strict=True):
            axis.step([1e3 * value for value in column], shares, where="post", label=label)
        axis.set(title=f"{name} (KS {ks:.2f})", xlabel="ms", ylabel="share of requests", ylim=(0, 1))
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)


async def main() -> None:
    """Fit, run both, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefill")
    parser.add_argument("decode")
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kv-bytes-per-token", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("compare_sim.png"))
    given = parser.parse_args()
    base = EngineProfile(
        block_size=given.block_size,
        num_blocks=given.num_blocks,
        max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=given.max_num_batched_tokens,
        kv_bytes_per_token=given.kv_bytes_per_token,
    )
    workload = make_workload(given.requests, given.rate, given.seed)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        pair = Pair(session, given.prefill, given.decode, given.model)
        prefill, decode = await fit(pair, base)
        print("prefill", prefill, "\ndecode", decode)
        real = await pair.run(workload)
    report(real, simulate(workload, prefill, decode), given.output)


if __name__ == "__main__":
    asyncio.run(main())
