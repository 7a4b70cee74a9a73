"""What each way to choose is worth: loads by fleets by models by strategies, as a table.

Run it with ``python -m benchmarks.choices --mooncake conversation_trace.jsonl``; with ``--ablation`` it
compares the preset with itself without one thing at a time. ``--full`` prints all figures. Each run is a
line of the file ``--runs``: what is there already is not run again, so that it can be stopped and go on. Of
the runs that are missing, those of small fleets come first.

The loads that are made up are drawn with seeds from ``--seed`` on, with which nothing was tuned.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_pd_scheduler.replay.fleet import FleetSpec, run_variant
from vllm_pd_scheduler.replay.intervals import Interval
from vllm_pd_scheduler.replay.load import Load
from vllm_pd_scheduler.replay.result import summary
from vllm_pd_scheduler.replay.variant import parse_variant

from .counts import counts

LLAMA, DEEPSEEK = "llama-3.3-70b-4xh100", "deepseek-v3-fp8-8xh200"
SETUPS = {"llama": LLAMA, "deepseek": DEEPSEEK}
TTFT_SLO, TPOT_SLO = 5.0, 0.05
PATIENT = "+queue_timeout=3600+queue_size=100000"
"""Nobody is refused: others hold no request back, so theirs wait as long as it takes."""


@dataclass(frozen=True)
class Shape:
    """A load for 4 + 4 instances: what larger fleets get grows with them."""

    trace: str
    requests: int
    rates: dict[str, float]
    """By model: multiple of the trace's own rate."""


LOADS = {
    "mooncake": Shape("mooncake", 1500, {"llama": 0.45, "deepseek": 1.45}),
    "agents": Shape("made:agents", 500, {"llama": 1.0, "deepseek": 4.0}),
    "chat": Shape("made:chat", 2000, {"llama": 200.0, "deepseek": 600.0}),
    "code": Shape("made:code", 800, {"llama": 14.0, "deepseek": 50.0}),
    "batch": Shape("made:batch", 400, {"llama": 2.0, "deepseek": 7.0}),
}
REQUESTS = {4: 1.0, 8: 1.5, 32: 4.0}
"""How many times as many requests a larger fleet gets; the rate grows with the fleet."""
PEERS = ("llm_d", "dynamo", "dynamo_conditional", "conversation", "ppd")
STRATEGIES = ("low_latency", "least_load", *PEERS)
ABLATION = (
    "low_latency", "low_latency+late_binding=false", "low_latency+disaggregation=always",
    "low_latency+disaggregation=auto", "slo",
)  # fmt: skip
"""The preset; without late binding, or prefills on D, or with those by cost; without both."""
FIGURES = {
    "ttft": ("TTFT mean, s", 1.0, 2),
    "p90": ("p90", 1.0, 2),
    "p99": ("p99", 1.0, 1),
    "tpot": ("TPOT mean, ms", 1e3, 1),
    "tpot_p99": ("p99", 1e3, 1),
    "slo": ("in SLO, %", 1e2, 1),
}
"""A column's title, what its figures are multiplied by, and digits."""


@dataclass(frozen=True)
class Run:
    """One run, by which its figures are found again."""

    load: str
    setup: str
    size: int
    strategy: str
    seed: int

    def figures(self, mooncake: str, settings: str = "") -> dict[str, float]:
        """Do it and return its figures, in seconds and shares."""
        shape = LOADS[self.load]
        text = mooncake if shape.trace == "mooncake" else shape.trace
        trace = Load(text, round(shape.requests * REQUESTS.get(self.size, self.size / 8))).trace(self.seed)
        fleet = FleetSpec(self.size, self.size, SETUPS[self.setup], self.seed, realistic=True)
        scaled = trace.scaled(shape.rates[self.setup] * self.size / 4)
        run = run_variant(parse_variant(self.strategy + PATIENT + settings), scaled, fleet, lambda _: None)
        found = summary(run, TTFT_SLO, TPOT_SLO)
        ttft, tpot = found.ttft, found.tpot
        if ttft is None or tpot is None:
            raise ValueError(f"{self}: nothing was answered")
        return {
            "ttft": ttft.mean, "p90": ttft.p90, "p99": ttft.p99, "tpot": tpot.mean, "tpot_p99": tpot.p99,
            "slo": found.attainment, "rejected": float(sum(found.rejected.values())),
            "failures": float(found.strategy_failures), "prefill_busy": found.prefill_busy or 0.0,
            "decode_busy": found.decode_busy or 0.0,
        }  # fmt: skip


def read(path: Path) -> dict[Run, dict[str, float]]:
    """Return the runs of a file, if there is one; of the same run the last."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {Run(**each["run"]): each["figures"] for each in map(json.loads, lines)}


def table(runs: dict[Run, dict[str, float]], wanted: Sequence[Run], beside: str) -> Iterator[str]:
    """Yield the lines of a table in Markdown, with the mean TTFT also as a multiple of one strategy's."""
    titles = [title for title, _, _ in FIGURES.values()]
    yield f"| load | fleet | model | strategy | x {beside} | {' | '.join(titles)} | runs |"
    yield "|" + "---|" * (len(titles) + 6)
    rows = dict.fromkeys((r.load, r.size, r.setup, r.strategy) for r in wanted)
    for load, size, setup, strategy in rows:
        found = [r for r in wanted if (r.load, r.size, r.setup, r.strategy) == (load, size, setup, strategy)]
        done = [(r, runs[r]) for r in found if r in runs]
        if not done:
            continue
        others = [runs.get(Run(load, setup, size, beside, r.seed)) for r, _ in done]
        ratios = [one["ttft"] / other["ttft"] for (_, one), other in zip(done, others, strict=True) if other]
        cells = [
            _cell([figures[name] * factor for _, figures in done], digits)
            for name, (_, factor, digits) in FIGURES.items()
        ]
        refused = sum(figures["rejected"] for _, figures in done)
        note = f"{len(done)}" + (f", {refused:.0f} refused" if refused else "")
        label = f"`{strategy}`"
        yield " | ".join((f"| {load}", f"{size}+{size}", setup, label, _cell(ratios, 2), *cells, note)) + " |"


def grid(runs: dict[Run, dict[str, float]], wanted: Sequence[Run]) -> Iterator[str]:
    """Yield the lines of a table in Markdown with a column for each strategy.

    The first has its mean TTFT in seconds, the others theirs as a multiple of that, seed by seed. Below is
    the 99th percentile of TPOT in ms.
    """
    strategies = list(dict.fromkeys(r.strategy for r in wanted))
    first_one, *others = (f"`{each}`" for each in strategies)
    titles = [f"{first_one}: s<br>ms", *(f"{each}: x<br>ms" for each in others)]
    yield f"| load | fleet, model, seeds | {' | '.join(titles)} |"
    yield "|" + "---|" * (len(strategies) + 2)
    for load, size, setup in dict.fromkeys((r.load, r.size, r.setup) for r in wanted):
        seeds = sorted({r.seed for r in wanted if Run(load, setup, size, strategies[0], r.seed) in runs})
        cells = []
        for strategy in strategies:
            found = [runs.get(Run(load, setup, size, strategy, seed)) for seed in seeds]
            first = [runs[Run(load, setup, size, strategies[0], seed)] for seed in seeds]
            own = [
                (one["ttft"] / (1.0 if strategy == strategies[0] else base["ttft"]), one["tpot_p99"] * 1e3)
                for one, base in zip(found, first, strict=True)
                if one
            ]
            tpot = sum(each for _, each in own) / max(1, len(own))
            cells.append(f"{_cell([each for each, _ in own], 2)}<br>{tpot:.0f}" if own else "")
        if any(cells):
            yield f"| {load} | {size}+{size} {setup}, {len(seeds)} | {' | '.join(cells)} |"


def _cell(values: Sequence[float], digits: int) -> str:
    interval = Interval.of(values)
    if interval is not None:
        return f"{interval.mean:.{digits}f} ± {interval.half:.{digits}f}"
    return f"{values[0]:.{digits}f}" if values else ""


def _wanted(given: argparse.Namespace) -> list[Run]:
    return [
        Run(load, setup, size, strategy, given.seed + more)
        for size in given.fleets
        for load in given.loads
        for setup in given.models
        for strategy in given.strategies or (ABLATION if given.ablation else STRATEGIES)
        for more in range(given.seeds)
    ]


def _named(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what reads names with commas between them; each must be known."""

    def read_names(text: str) -> list[str]:
        for each in (names := text.split(",")):
            if each not in known:
                raise argparse.ArgumentTypeError(f"{each!r} is none of {', '.join(known)}")
        return names

    return read_names


def _strategies(text: str) -> list[str]:
    """Read strategies with commas between them."""
    try:
        return [parse_variant(each).label for each in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file(text: str) -> str:
    """Read the name of a file that must be there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return text


def _run_all(runs: dict[Run, dict[str, float]], wanted: Iterable[Run], given: argparse.Namespace) -> None:
    with given.runs.open("a") as file:
        for run in sorted(wanted, key=lambda each: (each.size, each.seed)):
            if run in runs or (LOADS[run.load].trace == "mooncake" and not given.mooncake):
                continue
            runs[run] = run.figures(given.mooncake)
            file.write(json.dumps({"run": asdict(run), "figures": runs[run]}) + "\n")
            file.flush()
            print(run, f"{runs[run]['ttft']:.2f} s", file=sys.stderr)


def main() -> None:
    """Do what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mooncake", type=_file, help="Mooncake's trace; left out without it")
    parser.add_argument("--runs", type=Path, default=Path("choices.jsonl"), help="file of the runs")
    parser.add_argument("--loads", type=_named(LOADS), default=list(LOADS), help=f"of {', '.join(LOADS)}")
    parser.add_argument("--models", type=_named(SETUPS), default=list(SETUPS), help=f"of {', '.join(SETUPS)}")
    parser.add_argument("--fleets", type=counts(1), default=[4, 8, 32], help="P, and as many D: 4,8,32")
    parser.add_argument("--strategies", type=_strategies, help="in place of the preset and other routers'")
    parser.add_argument("--ablation", action="store_true", help="the preset without one thing at a time")
    parser.add_argument("--full", action="store_true", help="print all figures, a line for each strategy")
    parser.add_argument("--beside", default="least_load", help="whose mean TTFT the others' is a multiple of")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-print", action="store_true", help="run nothing")
    given = parser.parse_args()
    runs, wanted = read(given.runs), _wanted(given)
    if not given.only_print:
        _run_all(runs, wanted, given)
    print("\n".join(table(runs, wanted, given.beside) if given.full else grid(runs, wanted)))


if __name__ == "__main__":
    main()
