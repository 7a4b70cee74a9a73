"""Draws the runs of ``python -m benchmarks.choices``: how long clients wait with each strategy, by load.

    python docs/figures/choices.py choices.jsonl docs/figures/choices.png

A point is the mean time to the first token as a multiple of the preset's, of the same load, fleet, model and
seed; the mean over the seeds is shown. A hollow point has a 99th percentile of the time per output token
of more than 50 ms: it was bought with the clients' reading speed.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from benchmarks.choices import LOADS, SETUPS, STRATEGIES, TPOT_SLO, Run, read
from matplotlib import pyplot
from matplotlib.axes import Axes

PRESET = "low_latency"
OTHERS = [each for each in STRATEGIES if each != PRESET]
SIZES = {4: "o", 8: "s", 32: "D"}
COLOURS = dict(zip(SETUPS, ("tab:blue", "tab:orange"), strict=True))
LEAST_SPACE = 0.12
"""Between the points of one strategy, of the distance between strategies."""

Key = tuple[str, int, str, str]
"""Load, size, model and strategy."""


def ratios(runs: dict[Run, dict[str, float]]) -> dict[Key, tuple[float, float]]:
    """Return the mean ratio of TTFT to the preset's, and the mean of the 99th percentiles of TPOT."""
    found: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    for run, figures in runs.items():
        preset = runs.get(Run(run.load, run.setup, run.size, PRESET, run.seed))
        if preset is not None:
            ratio = figures["ttft"] / preset["ttft"]
            found[run.load, run.size, run.setup, run.strategy].append((ratio, figures["tpot_p99"]))
    return {key: (mean(r for r, _ in each), mean(t for _, t in each)) for key, each in found.items()}


def draw(axes: Axes, load: str, found: dict[Key, tuple[float, float]]) -> None:
    """Draw the panel of one load."""
    groups = [(size, setup) for size in SIZES for setup in SETUPS]
    for row, strategy in enumerate(OTHERS):
        for place, (size, setup) in enumerate(groups):
            if (load, size, setup, strategy) not in found:
                continue
            ratio, tpot = found[load, size, setup, strategy]
            colour, y = COLOURS[setup], row + (place - (len(groups) - 1) / 2) * LEAST_SPACE
            face = "none" if tpot > TPOT_SLO else colour
            axes.plot(ratio, y, SIZES[size], color=colour, markerfacecolor=face, markersize=6)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(ticks := [1, 2, 4, 8, 16], [f"{each:g}" for each in ticks])
    axes.set_xlim(0.7, 20)
    axes.minorticks_off()
    axes.set_yticks(range(len(OTHERS)), OTHERS)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(load)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs and write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("figure", type=Path)
    given = parser.parse_args(arguments)
    found = ratios(read(given.runs))
    figure, axes = pyplot.subplots(1, len(LOADS), figsize=(16, 4.6), sharey=True, layout="constrained")
    for panel, load in zip(axes, LOADS, strict=True):
        draw(panel, load, found)
    for size, marker in SIZES.items():
        axes[0].plot([], [], marker, color="black", label=f"{size} + {size}")
    for setup, colour in COLOURS.items():
        axes[0].plot([], [], "o", color=colour, label=setup)
    axes[0].plot([], [], "o", color="black", markerfacecolor="none", label="over 50 ms a token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"Mean time to the first token, as a multiple of {PRESET}'s")
    figure.savefig(given.figure, dpi=110)


if __name__ == "__main__":
    main()
