"""The figure of a comparison: distributions of times, and load over time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system.extras import install_command
from .job import Conditions, Outcome
from .result import LoadSample, RequestResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
"""Ends of the file names that :func:`plot` can write."""

_MAX_POINTS = 300
"""Points of a line of load: more cannot be told apart at the width of an axis."""
_STYLES = ("-", "--", ":", "-.")
_LOG_RATIO = 30
"""Largest over smallest value from which on an axis is logarithmic (a choice)."""


class PlotError(Exception):
    """A figure cannot be drawn; the message says what to do."""


def require_matplotlib() -> None:
    """Raise :exc:`PlotError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise PlotError(f"matplotlib is not installed: `{install_command('replay')}` installs it")


def plot(outcomes: Sequence[Outcome], conditions: Conditions, path: Path) -> None:
    """Write the figure to ``path``, whose suffix is one of :data:`SUFFIXES`. No display is needed.

    Raise :exc:`PlotError` without matplotlib, and OSError if the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 12), layout="constrained")
    axes = figure.subplots(3, 2)
    _shares(axes[0, 0], outcomes, "time to first token (s)", lambda each: each.ttft, conditions.ttft_slo)
    _shares(axes[0, 1], outcomes, "time per output token (s)", lambda each: each.tpot, conditions.tpot_slo)
    for column, role in enumerate(("prefill", "decode")):
        _load(axes[1, column], outcomes, role, "waiting", lambda sample: sample.waiting)
        _load(axes[2, column], outcomes, role, "running", lambda sample: sample.running)
        axes[1, column].sharex(axes[2, column])
    handles, labels = axes[2, 0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(outcomes)))
    for text in legend.get_texts():
        text.set_parse_math(False)
    fleet = conditions.fleet
    figure.suptitle(
        f"{conditions.trace} at {conditions.rate:g} times its rate, {conditions.requests} requests; "
        f"{fleet.prefill} prefill and {fleet.decode} decode instances, {fleet.setup}",
        parse_math=False,
    )
    figure.savefig(path, dpi=120)


def _shares(
    axes: Axes,
    outcomes: Sequence[Outcome],
    label: str,
    value: Callable[[RequestResult], float | None],
    slo: float,
) -> None:
    """Draw the cumulative distribution of a time over all requests; rejected ones keep a line below 1."""
    widest: list[float] = [slo]
    for index, outcome in enumerate(outcomes):
        results = outcome.run.results
        times = sorted(time for time in map(value, results) if time is not None)
        # Answers of one token have no time per output token, so they are not counted for it.
        missing = sum(each.ttft is None for each in results)
        whole = len(times) + missing
        axes.step(
            times,
            [(rank + 1) / whole for rank in range(len(times))],
            where="post",
            **_line(index),
        )
        above = [time for time in times if time > 0]  # a logarithmic axis has no 0
        widest += above[:1] + above[-1:]
    axes.axvline(slo, color="grey", linewidth=0.8, label=f"SLO: {slo:g} s")
    axes.legend(loc="lower right")
    if min(widest) * _LOG_RATIO < max(widest):
        axes.set_xscale("log")
    axes.set(xlabel=label, ylabel="share of requests", ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def _load(
    axes: Axes, outcomes: Sequence[Outcome], role: str, what: str, value: Callable[[LoadSample], int]
) -> None:
    """Draw the sum of ``value`` over the instances of a role at each sampled moment."""
    for index, outcome in enumerate(outcomes):
        run = outcome.run
        members = run.prefill_busy if role == "prefill" else run.decode_busy
        sums: dict[float, int] = defaultdict(int)
        for sample in run.samples:
            if sample.instance in members:
                sums[sample.time] += value(sample)
        times, sizes = _thinned(sorted(sums.items()))
        axes.step(times, sizes, where="post", label=run.strategy, **_line(index))
    axes.set(xlabel="time (s)", ylabel=f"requests {what}", title=f"{role}: {what}")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)


def _thinned(points: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """Return times and values of at most ``_MAX_POINTS`` points, each the mean of its neighbours."""
    width = max(1, math.ceil(len(points) / _MAX_POINTS))
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [group[0][0] for group in groups], [
        math.fsum(size for _, size in group) / len(group) for group in groups
    ]


def _line(index: int) -> dict[str, Any]:
    """Return the style of the line of a strategy: ten colours, then another dash pattern for the next ten."""
    return {"color": f"C{index % 10}", "linestyle": _STYLES[index // 10 % 4], "linewidth": 1.2}
