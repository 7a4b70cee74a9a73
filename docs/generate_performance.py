"""Puts the figures of ``benchmarks/figures.json`` into ``docs/performance.md`` and draws its plot.

``make bench-save`` runs it. A test compares the page with the file.
"""

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.routers import figures, report
from benchmarks.routers.figures import Figures
from benchmarks.routers.routers import OURS

PAGE = Path(__file__).parent / "performance.md"
PLOT = Path(__file__).parent / "figures" / "performance.png"


class Panel(NamedTuple):
    """A panel of the plot: what it shows of which workloads."""

    title: str
    metric: str
    workloads: tuple[str, ...]


_REQUESTS = ("requests-1", "requests-16", "requests-64")
PANELS = (
    Panel("CPU a request, ms", "cpu_ms", _REQUESTS),
    Panel("Requests/s", "requests_per_s", _REQUESTS),
    Panel("p50, ms", "p50_ms", _REQUESTS),
    Panel("CPU per 1,000 streamed tokens, ms", "cpu_ms_per_1000_tokens", ("streams-64", "burst-256")),
    Panel("CPU of a large prompt, ms", "cpu_ms", ("prompts-1mb", "prompts-10mb")),
    Panel("CPU a request, shared prefixes, ms", "cpu_ms", ("prefixes-16", "prefixes-64")),
)
LABELS = {
    "requests-1": "1 client",
    "requests-16": "16",
    "requests-64": "64",
    "streams-64": "64 streams",
    "burst-256": "256 streams",
    "prompts-1mb": "1 MB",
    "prompts-10mb": "10 MB",
    "prefixes-16": "16 clients",
    "prefixes-64": "64 clients",
}

_BEGIN, _END = "<!-- figures: make bench-save writes them -->\n\n", "\n<!-- end of the figures -->\n"


def page(text: str, found: Figures) -> str:
    """Return the page with these figures in place of those that it has."""
    before, _, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"{PAGE.name} must have the lines {_BEGIN.strip()} and {_END.strip()}")
    return "".join((before, _BEGIN, _block(found), _END, after))


def _block(found: Figures) -> str:
    heads = report.heads(found)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in report.rows(found)]
    runs = max(len(each) for each in found.samples[PANELS[0].workloads[0]][OURS].values())
    taken = f"Version {found.versions[OURS]}, {found.taken}, {found.machine}."
    return f"{taken} Medians of {runs} interleaved runs, with the range:\n\n" + "\n".join(lines) + "\n"


def plot(found: Figures, path: Path) -> None:
    """Write the bars of all panels to ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        _bars(axes, found, panel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=120)


def _bars(axes: Any, found: Figures, panel: Panel) -> None:
    """Draw a bar for each router and workload, with a line for the range."""
    width = 0.8 / len(found.versions)
    for number, (router, version) in enumerate(found.versions.items()):
        values = [found.figure(each, router, panel.metric) for each in panel.workloads]
        middles = [each.median if each else 0.0 for each in values]
        below = [each.median - each.range[0] if each else 0.0 for each in values]
        above = [each.range[1] - each.median if each else 0.0 for each in values]
        places = [at + (number - (len(found.versions) - 1) / 2) * width for at in range(len(panel.workloads))]
        axes.bar(places, middles, width, yerr=(below, above), capsize=2, label=f"{router} {version}")
    axes.set_xticks(range(len(panel.workloads)), [LABELS[each] for each in panel.workloads])
    axes.set_title(panel.title, fontsize=10)


if __name__ == "__main__":
    last = figures.load(figures.LAST_RELEASE)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), last), encoding="utf-8")
    plot(last, PLOT)
