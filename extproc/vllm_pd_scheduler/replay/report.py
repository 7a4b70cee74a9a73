"""The output of a comparison: tables, JSON, and progress bars while it runs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .intervals import Interval, intervals, ratio
from .job import TARGET, Conditions, Outcome
from .pool import PoolProgress
from .result import Spread

SCHEMA = 1
"""Version of the JSON's schema: it changes when a field is removed or means something else."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table: one figure of each strategy.

    ``show`` is the format of the value times ``scale``. ``best`` returns the best of the values; it is None
    for a figure that is neither good nor bad.
    """

    title: str
    value: Callable[[Outcome], float | None]
    show: str
    best: Callable[[Iterable[float]], float] | None = min
    scale: float = 1.0

    def texts(self, outcomes: Sequence[Outcome]) -> list[Text]:
        """Return the cells. The best ones, as they are shown, have a star, unless all are the same."""
        values = [self.value(outcome) for outcome in outcomes]
        shown = ["-" if value is None else format(value * self.scale, self.show) for value in values]
        known = [value for value in values if value is not None]
        star = shown[values.index(self.best(known))] if known and self.best else None
        if len(set(shown)) < 2:
            star = None
        return [Text(f"{text}*", style="bold green") if text == star else Text(f"{text} ") for text in shown]


def _of_spread(time: str, figure: str) -> Callable[[Outcome], float | None]:
    def value(outcome: Outcome) -> float | None:
        spread: Spread | None = getattr(outcome.summary, time)
        return None if spread is None else float(getattr(spread, figure))

    return value


def _of_summary(name: str) -> Callable[[Outcome], float | None]:
    def value(outcome: Outcome) -> float | None:
        figure: float | None = getattr(outcome.summary, name)
        return figure

    return value


_FIGURES = ("mean", "p50", "p90", "p99")
_TTFT = (
    _Column("in SLO\n%", _of_summary("attainment"), ".2f", max, 100),
    *(_Column(f"TTFT s\n{figure}", _of_spread("ttft", figure), ".3f") for figure in _FIGURES),
)
_TPOT = tuple(
    _Column(f"TPOT ms\n{figure}", _of_spread("tpot", figure), ".2f", scale=1000) for figure in _FIGURES
)
_RATE = _Column(
    f"rate at\n{TARGET:.0%}",
    lambda outcome: outcome.search_result.rate if outcome.search_result else None,
    ".3f",
    max,
)
_FLEET = (
    _Column("prefix\nhits %", _of_summary("prefix_hits"), ".1f", max, 100),
    _Column("P load\nmax/mean", _of_summary("imbalance_max"), ".3f"),
    _Column("P load\nCV", _of_summary("imbalance_cv"), ".3f"),
    _Column("P busy\n%", _of_summary("prefill_busy"), ".1f", None, 100),
    _Column("D busy\n%", _of_summary("decode_busy"), ".1f", None, 100),
    _Column("rejected\n", lambda outcome: sum(outcome.summary.rejected.values()), ".0f"),
    _Column("makespan\ns", _of_summary("makespan"), ".1f"),
    _Column("run took\ns", _of_summary("seconds"), ".1f", None),
)


def show(outcomes: Sequence[Outcome], conditions: Conditions, console: Console) -> None:
    """Print tables with a row for each strategy, and notes below them."""
    fleet = conditions.fleet
    console.print(
        f"{conditions.trace}: {conditions.requests} requests at {conditions.rate:g} times their rate "
        f"({_per_second(conditions)}), {fleet.prefill} prefill and {fleet.decode} decode instances, "
        f"set-up {fleet.setup}, seed {fleet.seed}",
        markup=False,
        highlight=False,
    )
    slo = f"SLO: {conditions.ttft_slo:g} s, and {conditions.tpot_slo * 1000:g} ms for each further token"
    searched = any(outcome.search_result for outcome in outcomes)
    console.print(_table(f"Time to first token ({slo})", _TTFT + (_RATE,) * searched, outcomes))
    console.print(_table("Time per output token", _TPOT, outcomes))
    console.print(_table("Fleet", _FLEET, outcomes))
    if outcomes[0].repeats:
        console.print(_repeats(outcomes))
    for note in _notes(outcomes):
        console.print(note, markup=False, highlight=False)


def as_json(outcomes: Sequence[Outcome], conditions: Conditions) -> dict[str, Any]:
    """Return all figures, for :func:`json.dumps`; ``docs/replay.md`` describes the schema."""
    return {
        "schema": SCHEMA,
        "versions": {"vllm_pd_scheduler": _version(), "python": platform.python_version()},
        "trace": {
            "name": conditions.trace,
            "requests": conditions.requests,
            "seconds": conditions.trace_seconds,
        },
        "fleet": asdict(conditions.fleet),
        "rate": conditions.rate,
        "slo": {"ttft": conditions.ttft_slo, "tpot": conditions.tpot_slo, "target": TARGET},
        "strategies": [_entry(outcome) for outcome in outcomes],
    }


@contextmanager
def progress_bars(labels: Sequence[str], requests: int, console: Console) -> Iterator[PoolProgress]:
    """Return a context that shows a progress bar for each label, or none if the console is no terminal."""
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks = [bars.add_task(label, total=requests) for label in labels]

    def progress(index: int, rate: float, finished: int) -> None:
        bars.update(tasks[index], completed=finished, description=f"{labels[index]} x{rate:.3g}")

    with bars:
        yield progress


def _table(title: str, columns: Sequence[_Column], outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("\nstrategy", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    cells = [column.texts(outcomes) for column in columns]
    for index, outcome in enumerate(outcomes):
        table.add_row(Text(outcome.run.strategy), *(each[index] for each in cells))
    return table


_REPEATS = (
    ("in SLO\n%", "attainment", ".1f", 100.0),
    ("TTFT s\nmean", "ttft_mean", ".3f", 1.0),
    ("TTFT s\np90", "ttft_p90", ".2f", 1.0),
    ("TTFT s\np99", "ttft_p99", ".2f", 1.0),
    ("TPOT ms\nmean", "tpot_mean", ".1f", 1000.0),
    ("TPOT ms\np99", "tpot_p99", ".1f", 1000.0),
)


def _repeats(outcomes: Sequence[Outcome]) -> Table:
    """Return a table of means over all seeds, with half the width of their 95 % confidence intervals."""
    first = outcomes[0]
    table = Table(
        title=f"Over {len(first.repeats)} seeds: mean ± half of the 95 % confidence interval",
        title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("\nstrategy", overflow="fold", min_width=12)
    for title, *_ in _REPEATS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("mean TTFT,\nof the first's", justify="right", no_wrap=True)
    for outcome in outcomes:
        found = intervals(outcome.repeats)
        cells = [_shown(found[name], show, scale) for _, name, show, scale in _REPEATS]
        of_first = "1" if outcome is first else _shown(ratio(outcome.repeats, first.repeats), ".2f")
        table.add_row(Text(outcome.run.strategy), *cells, of_first)
    return table


def _shown(interval: Interval | None, show: str, scale: float = 1.0) -> str:
    if interval is None:
        return "-"
    return f"{format(interval.mean * scale, show)} ± {format(interval.half * scale, show)}"


def _notes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        label, search = outcome.run.strategy, outcome.search_result
        if outcome.summary.rejected:
            reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(outcome.summary.rejected.items()))
            yield f"{label}: rejected: {reasons}"
        if failures := outcome.summary.strategy_failures:
            yield f"{label}: the strategy failed in {failures} calls, for which least_load took its place"
        if search and search.rate is None:
            lowest = min(rate for rate, _ in search.tried)
            yield (
                f"{label}: no rate has {TARGET:.0%} of the requests within the limits, not even "
                f"{lowest:.3g} with {search.attainment:.1%}"
            )
        elif search and search.open_ended:
            yield (
                f"{label}: {search.attainment:.1%} are within the limits even at {search.rate:g}, "
                "the highest rate tried"
            )


def _entry(outcome: Outcome) -> dict[str, Any]:
    entry = asdict(outcome.summary)
    found = intervals(outcome.repeats) if outcome.repeats else None
    entry["intervals"] = found and {name: each and asdict(each) for name, each in found.items()}
    search = outcome.search_result
    entry["find_rate"] = search and {
        "rate": search.rate,
        "attainment": search.attainment,
        "open_ended": search.open_ended,
        "tried": [{"rate": rate, "attainment": attainment} for rate, attainment in search.tried],
    }
    return entry


def _per_second(conditions: Conditions) -> str:
    if not conditions.trace_seconds:
        return "all at once"
    return f"{conditions.requests * conditions.rate / conditions.trace_seconds:.3g} a second"


def _version() -> str:
    try:
        return version("vllm-pd-scheduler")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
