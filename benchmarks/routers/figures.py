"""The figures of a run: what is kept in a file, medians and ratios, and what has become dearer."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .routers import ENVOY, OURS

LAST_RELEASE = Path(__file__).parents[1] / "figures.json"
"""The figures of the last release."""
TOLERANCE = 0.10
"""The share by which a cost may grow before it is marked."""

MORE_IS_BETTER = ("requests_per_s",)
NOT_JUDGED = ("p99_ms", "added_p50_ms")
"""Metrics that are too noisy, or are no ratio scale."""


@dataclass(frozen=True)
class Figure:
    """The values of a metric in all runs: their median and their range."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median."""
        return median(self.values)

    @property
    def range(self) -> tuple[float, float]:
        """Return the least and the greatest value."""
        return min(self.values), max(self.values)


@dataclass
class Figures:
    """All that a run has measured. ``samples[workload][router][metric]`` has a value for each run."""

    taken: str
    machine: str
    versions: dict[str, str]
    samples: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)

    def add(self, workload: str, router: str, sample: dict[str, float]) -> None:
        """Append the values of one run."""
        metrics = self.samples.setdefault(workload, {}).setdefault(router, {})
        for metric, value in sample.items():
            metrics.setdefault(metric, []).append(float(f"{value:.5g}"))

    def figure(self, workload: str, router: str, metric: str) -> Figure | None:
        """Return a metric's figure, or ``None`` where it was not measured."""
        values = self.samples.get(workload, {}).get(router, {}).get(metric)
        return Figure(tuple(values)) if values else None

    def ratio(self, workload: str, metric: str, router: str = OURS, to: str = ENVOY) -> Figure | None:
        """Return a router's figure over another's, run by run: what slows both in a run cancels out."""
        one, other = (self.figure(workload, each, metric) for each in (router, to))
        if one is None or other is None or not all(other.values):
            return None
        return Figure(tuple(a / b for a, b in zip(one.values, other.values, strict=True)))

    def save(self, path: Path) -> None:
        """Write the figures to a file."""
        path.write_text(_lines(asdict(self)) + "\n", encoding="utf-8")


def load(path: Path) -> Figures:
    """Return the figures of a file."""
    return Figures(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Change:
    """How the scheduler's cost, as a ratio to the bare Envoy's of the same run, has changed."""

    workload: str
    metric: str
    before: float
    now: float

    @property
    def growth(self) -> float:
        """Return by which share the cost has grown; below 0 it has fallen."""
        growth = self.before / self.now if self.metric in MORE_IS_BETTER else self.now / self.before
        return growth - 1

    @property
    def is_dearer(self) -> bool:
        """Whether it has grown beyond the tolerance."""
        return self.growth > TOLERANCE


def changes(before: Figures, now: Figures) -> Iterator[Change]:
    """Yield a change for each metric that both have and that is judged."""
    for workload, routers in now.samples.items():
        for metric in routers.get(OURS, {}):
            old, new = before.ratio(workload, metric), now.ratio(workload, metric)
            if old and new and metric not in NOT_JUDGED:
                yield Change(workload, metric, old.median, new.median)


def _lines(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each list, so that a change of figures reads well as a difference."""
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + "  "
    entries = [f"{inner}{json.dumps(key)}: {_lines(each, inner)}" for key, each in value.items()]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
