"""The command ``replay``, which compares strategies on a recorded load.

The room ``replay`` is imported inside functions: it takes long to load, and other commands do not need it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..replay import DEFAULT_SETUP, OVERSUBSCRIPTION

if TYPE_CHECKING:
    from ..replay.fleet import FleetSpec
    from ..replay.job import Conditions, Job, Outcome
    from ..replay.load import Load
    from ..replay.trace import Trace
    from ..replay.variant import Sharing, Variant

_FILE_WIDTH = 140
"""Columns of output that goes to a file or a pipe: the widest table does not wrap."""
_SYNC_DELAY = "10ms"
"""How late schedulers hear of each other unless it is said."""
_MOST_S = 1e6
"""Seconds of a run that can be named."""


def _finite(value: float) -> float:
    """Return an option's value; raise for NaN and infinity, which its ``min`` and ``max`` let through."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be used")
    return value


def replay(
    trace: Annotated[
        str,
        typer.Option(help="A file or folder with a recorded load, or made:SHAPE; a wrong shape names all."),
    ],
    strategies: Annotated[
        str, typer.Option(help="Separated by commas, each maybe with settings: a,b+setting=1.")
    ],
    prefill: Annotated[int, typer.Option(min=1, max=1000, help="Prefill instances.")],
    decode: Annotated[int, typer.Option(min=1, max=1000, help="Decode instances.")],
    rate: Annotated[
        float, typer.Option(min=1e-6, max=1e6, callback=_finite, help="Multiple of the trace's own rate.")
    ] = 1.0,
    setup: Annotated[
        str, typer.Option(help="Model and machine that the engines simulate; a wrong one names all.")
    ] = DEFAULT_SETUP,
    spread: Annotated[
        str, typer.Option(help="Let requests come at random up to so much later, if times are coarse: 3s.")
    ] = "0s",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Runs with seeds one after the other, for intervals.")
    ] = 1,
    sessions: Annotated[
        int,
        typer.Option(
            min=1, max=100_000, help="Conversations at a time, where a trace has no times for them."
        ),
    ] = 16,
    realistic: Annotated[
        bool, typer.Option("--realistic", help="Answers cached, shared links, turns that wait for answers.")
    ] = False,
    foreign: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the sessions that another router sends.")
    ] = 0.0,
    leaves: Annotated[
        int, typer.Option(min=1, max=1000, help="Leaf switches of the fleet, with --realistic.")
    ] = 1,
    oversubscription: Annotated[
        float,
        typer.Option(
            min=1.0, max=1e6, callback=_finite, help="How much less than its ports a leaf's cables carry."
        ),
    ] = OVERSUBSCRIPTION,
    ttft_slo: Annotated[
        float, typer.Option(min=1e-6, callback=_finite, help="Limit of the time to first token, s.")
    ] = 5.0,
    tpot_slo: Annotated[
        float, typer.Option(min=1e-6, callback=_finite, help="Limit of the time per output token, s.")
    ] = 0.05,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw there: .png, .svg or .pdf.")] = None,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Search each one's highest rate with 95 % within the limits.")
    ] = False,
    replicas: Annotated[
        int,
        typer.Option(min=1, max=64, help="Schedulers, to compare with one: sharing what they do, and not."),
    ] = 1,
    sync_delay: Annotated[
        str, typer.Option(help="How late schedulers hear of each other: 10ms, 0.5s.")
    ] = _SYNC_DELAY,
    sync_loss: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=_finite, help="Share of their messages that are lost.")
    ] = 0.0,
    replica_dies: Annotated[
        str | None, typer.Option(help="When one of the schedulers dies: 600s after the start.")
    ] = None,
    replica_joins: Annotated[
        str | None, typer.Option(help="When one more scheduler joins: 900s after the start.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Strategies run side by side; else one a core.")
    ] = None,
) -> None:
    """Compare strategies on a recorded load, with simulated engines in virtual time."""
    from ..replay.fleet import run_variant
    from ..replay.job import Conditions, Job
    from ..replay.load import Load

    if leaves > 1 and not realistic:
        _refuse("--leaves", "only with --realistic do transfers share links")
    if oversubscription != OVERSUBSCRIPTION and leaves == 1:
        _refuse("--oversubscription", "only with --leaves are there cables between leaf switches")
    for option, is_given in (
        ("--sync-delay", sync_delay != _SYNC_DELAY),
        ("--sync-loss", sync_loss > 0.0),
        ("--replica-dies", replica_dies is not None),
        ("--replica-joins", replica_joins is not None),
    ):
        if is_given and replicas == 1:
            _refuse(option, "only with --replicas are there several schedulers")
    _check_outputs(trace, json_path, plot_path)
    dies, joins = (
        None if text is None else _seconds(option, text, _MOST_S)
        for option, text in (("--replica-dies", replica_dies), ("--replica-joins", replica_joins))
    )
    variants = _variants(strategies)
    if replicas > 1:
        from ..replay.variant import Sharing

        delay = _seconds("--sync-delay", sync_delay)
        variants = _replicated(variants, Sharing(replicas, delay, sync_loss, dies, joins))
    if foreign and find_rate:
        _refuse("--foreign", "not with --find-rate, which counts all requests")
    fleet = _fleet(prefill, decode, setup, seed, realistic, leaves, oversubscription, foreign)
    load = Load(trace, limit, sessions)
    loaded = _load(load, seed)
    if (most := _seconds("--spread", spread)) > 0.0:
        loaded = loaded.spread(most, seed)
    if not (find_rate or realistic):  # there the load takes as long as it takes
        for option, at in (("--replica-dies", dies), ("--replica-joins", joins)):
            if at is not None and at > (end := loaded.seconds / rate):
                _refuse(option, f"{at:g}s: the load ends before, after {end:.0f}s")
    conditions = Conditions(load.name, len(loaded.requests), loaded.seconds, fleet, rate, ttft_slo, tpot_slo)
    job = Job(loaded, conditions, find_rate, run_variant, seeds, load if load.shape else None)
    outcomes = _run(job, variants, jobs or os.cpu_count() or 1)
    _publish(outcomes, conditions, json_path, plot_path)


def _check_outputs(trace: str, json_path: Path | None, plot_path: Path | None) -> None:
    """Exit with an error, before a long run, if its results could not be written after it."""
    from ..replay.plot import SUFFIXES, PlotError, require_matplotlib

    for option, path in (("--json", json_path), ("--plot", plot_path)):
        if path is None:
            continue
        if problem := _unwritable(path):
            _refuse(option, f"{path}: {problem}")
        if path.resolve() == Path(trace).resolve():
            _refuse(option, f"{path}: that is the trace itself")
    if plot_path is None:
        return
    if plot_path.suffix.lower() not in SUFFIXES:
        _refuse("--plot", f"{plot_path}: the name must end in one of {', '.join(SUFFIXES)}")
    if json_path and plot_path.resolve() == json_path.resolve():
        _refuse("--plot", f"{plot_path}: that is where --json writes")
    try:
        require_matplotlib()
    except PlotError as error:
        _refuse("--plot", str(error))


def _unwritable(path: Path) -> str | None:
    """Return why a file cannot be written, or ``None``."""
    if path.is_dir():
        return "is a directory"
    if not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return "cannot be written: Permission denied"
    return None


def _variants(text: str) -> list[Variant]:
    """Return the variants that ``--strategies`` names."""
    from ..replay.variant import parse_variant

    variants: dict[str, Variant] = {}
    for name in (part.strip() for part in text.split(",")):
        try:
            if not name:
                raise ValueError("a name is missing beside a comma" if "," in text else "name at least one")
            variant = parse_variant(name)
        except ValueError as error:
            _refuse("--strategies", str(error))
        if variants.setdefault(variant.label, variant) is not variant:
            _refuse("--strategies", f"{variant.label} is named twice")
    return list(variants.values())


def _replicated(variants: list[Variant], sharing: Sharing) -> list[Variant]:
    """Return each variant with one scheduler, and with several that share what they do, or do not.

    If one of them dies or joins, there is a run without that, too.
    """
    steady = replace(sharing, dies=None, joins=None)
    kinds = dict.fromkeys((steady, sharing, replace(steady, delay=None, loss=0.0)))
    return [each for one in variants for each in (one, *(one.shared(kind) for kind in kinds))]


def _seconds(option: str, text: str, most: float = 60.0) -> float:
    """Return the seconds that a user wrote as ``10ms``, ``0.5s`` or a number of seconds."""
    value, factor = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    try:
        seconds = float(value) * factor
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds <= most:
        _refuse(option, f"{text}: write it as 10ms or 0.5s, at most {most:g}s")
    return seconds


def _fleet(
    prefill: int,
    decode: int,
    setup: str,
    seed: int,
    realistic: bool,
    leaves: int,
    oversubscription: float,
    foreign: float,
) -> FleetSpec:
    from ..replay.fleet import FleetSpec

    try:
        return FleetSpec(prefill, decode, setup, seed, realistic, leaves, oversubscription, foreign)
    except ValueError as error:
        _refuse("--setup", str(error))


def _load(load: Load, seed: int) -> Trace:
    from ..replay.trace import TraceError

    try:
        return load.trace(seed)
    except TraceError as error:
        _fail(str(error), 2)


def _run(job: Job, variants: list[Variant], processes: int) -> list[Outcome]:
    from rich.console import Console

    from ..replay.job import ReplayError
    from ..replay.pool import run_all
    from ..replay.report import progress_bars

    labels = [variant.label for variant in variants]
    try:
        with progress_bars(labels, job.conditions.requests, Console(stderr=True)) as progress:
            return run_all(job, variants, processes, progress)
    except ReplayError as error:
        _fail(str(error), 1)


def _publish(
    outcomes: list[Outcome], conditions: Conditions, json_path: Path | None, plot_path: Path | None
) -> None:
    """Print the tables, then write the files: a file that cannot be written loses no result."""
    from rich.console import Console

    from ..replay.plot import plot
    from ..replay.report import as_json, show

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    show(outcomes, conditions, console)
    if json_path:
        text = json.dumps(as_json(outcomes, conditions), indent=2, ensure_ascii=False) + "\n"
        _write(json_path, lambda path: path.write_text(text, encoding="utf-8"))
    if plot_path:
        _write(plot_path, lambda path: plot(outcomes, conditions, path))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        _fail(f"{path}: cannot be written: {error.strerror}", 1)


def _refuse(option: str, message: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint=option)


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"vllm-pd-scheduler: {message}", err=True)
    raise typer.Exit(status)
