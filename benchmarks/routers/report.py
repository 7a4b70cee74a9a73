"""The figures as text."""

from collections.abc import Iterator

from .figures import TOLERANCE, Change, Figure, Figures
from .routers import OURS, PEER
from .run import IDLE
from .workloads import WORKLOADS

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"

TITLES = {IDLE: "idle", **{each.name: each.title for each in WORKLOADS}}
"""What a workload is called."""
METRICS = {
    "cpu_ms": ("CPU a request", "ms"),
    "requests_per_s": ("requests/s", ""),
    "p50_ms": ("p50", "ms"),
    "p99_ms": ("p99", "ms"),
    "added_p50_ms": ("p50 above a direct client's", "ms"),
    "cpu_ms_per_1000_tokens": ("CPU per 1,000 tokens", "ms"),
    "ttft_p50_ms": ("first token, p50", "ms"),
    "resident_mb": ("memory", "MB"),
}
"""What a metric is called, and its unit."""


def short(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(figure: Figure | None) -> str:
    """Return a median and its range."""
    if figure is None:
        return ""
    low, high = figure.range
    return (
        short(figure.median) if low == high else f"{short(figure.median)} ({short(low)}{DASH}{short(high)})"
    )


def rows(figures: Figures) -> Iterator[list[str]]:
    """Yield workload, metric, a median with its range for each router, and the scheduler's ratios."""
    for workload, routers in figures.samples.items():
        for metric in routers.get(OURS, {}):
            name, unit = METRICS[metric]
            values = [spread(figures.figure(workload, each, metric)) for each in figures.versions]
            ratios = [figures.ratio(workload, metric)]
            if PEER in figures.versions:
                ratios.append(figures.ratio(workload, metric, to=PEER))
            difference = metric == "added_p50_ms"  # a ratio of differences says nothing
            numbers = ["" if difference or not each else f"{each.median:.2f}" for each in ratios]
            yield [TITLES[workload], f"{name}, {unit}" if unit else name, *values, *numbers]


def heads(figures: Figures) -> list[str]:
    """Return the heads of the columns of :func:`rows`."""
    ratios = [f"{TIMES} Envoy"] + [f"{TIMES} vllm-router"] * (PEER in figures.versions)
    return ["load", "metric", *(f"{name} {version}" for name, version in figures.versions.items()), *ratios]


def table(figures: Figures) -> str:
    """Return the figures as a table for a terminal."""
    lines = [heads(figures), *rows(figures)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def comparison(found: list[Change], taken: str) -> str:
    """Return what has become dearer or cheaper since the last release, in words."""
    lines = [f"Against the figures of {taken}, as ratios to the bare Envoy of the same run:"]
    for each in found:
        if abs(each.growth) > TOLERANCE:
            mark = "DEARER " if each.is_dearer else "cheaper"
            name = METRICS[each.metric][0]
            lines.append(
                f"  {mark} {TITLES[each.workload]}: {name}: {each.before:.2f} → {each.now:.2f} {TIMES} Envoy "
                f"(cost {each.growth:+.0%})"
            )
    if len(lines) == 1:
        lines.append(f"  nothing has changed by more than {TOLERANCE:.0%}")
    return "\n".join(lines)
