"""How the operators' commands show what the scheduler says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_FILE_WIDTH = 1_000
"""Columns of output that goes to a file or a pipe: no table wraps there, or leaves something out."""

_GAP = 3
"""Columns of the terminal between two of a table."""

_STATE_STYLES = {
    "healthy": "green",
    "trial": "yellow",
    "starting": "yellow",
    "draining": "yellow",
    "ejected": "red",
    "unhealthy": "red",
}
LEVEL_STYLES = {"WARNING": "yellow", "ERROR": "red"}

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def console() -> Console:
    """Return where tables are printed."""
    found = Console(highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = _FILE_WIDTH
    return found


def table(*heads: str) -> Table:
    """Return an empty table. A head that begins with ``>`` is of a column of numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for head in heads:
        numbers = head.startswith(">")
        made.add_column(head.removeprefix(">"), justify="right" if numbers else "left", overflow="fold")
    return made


def fitting(
    heads: Sequence[str],
    rows: Sequence[Sequence[Text | str]],
    spare: Sequence[str],
    wrapped: Mapping[str, int],
) -> Table:
    """Return a table for which the terminal has room.

    Where there is not, the first of the ``spare`` columns go. The ``wrapped`` ones keep so much, if there is
    so much in them. No other is broken.
    """
    room = console().width
    columns = [[head.removeprefix(">"), *(str(row[at]) for row in rows)] for at, head in enumerate(heads)]
    widths = [min(max(map(cell_len, texts)), wrapped.get(texts[0], _FILE_WIDTH)) for texts in columns]
    kept = list(range(len(heads)))
    for name in spare:
        if sum(widths[at] for at in kept) + _GAP * (len(kept) - 1) <= room:
            break
        kept = [at for at in kept if columns[at][0] != name]
    made = table(*(heads[at] for at in kept))
    for column, at in zip(made.columns, kept, strict=True):
        column.min_width, column.no_wrap = widths[at], columns[at][0] not in wrapped
    for row in rows:
        made.add_row(*(row[at] for at in kept))
    return made


def plain(value: object, style: str = "") -> Text:
    """Return a text as it is, but for what would steer the terminal: some of it is a client's choice."""
    shown = "\N{EN DASH}" if value is None or value == "" else str(value)
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown), style)


def state_of(instance: Mapping[str, Any]) -> Text:
    """Return the state of an instance, in its colour."""
    state = instance.get("shown_state") or instance["state"]
    if instance.get("drained"):
        state = "drained"
    return plain(state, _STATE_STYLES.get(state, ""))


def number(value: float | None) -> str:
    """Return a count or a share of a count."""
    return "\N{EN DASH}" if value is None else f"{value:,.0f}"


def share(value: float | None) -> str:
    """Return a share as percents."""
    return "\N{EN DASH}" if value is None else f"{100 * value:.0f} %"


def seconds(value: float | None) -> str:
    """Return a short time."""
    if value is None:
        return "\N{EN DASH}"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else long_time(value)


def long_time(value: float) -> str:
    """Return a time in its two largest units."""
    minutes, left = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (left, "s")]
    while len(units) > 1 and not units[0][0]:
        units.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in units[:2])


def size(value: float) -> str:
    """Return a number of bytes."""
    unit = 0
    while value >= 1024 and unit < len(_BYTES) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_BYTES[unit]}" if unit == 0 else f"{value:.1f} {_BYTES[unit]}"


def local_time(text: str) -> str:
    """Return a time of the scheduler, RFC 3339, in this machine's time zone."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def instances(found: Iterable[Mapping[str, Any]]) -> Table:
    """Return a table of instances."""
    heads = (
        "INSTANCE",
        "ROLE",
        "STATE",
        ">IN FLIGHT",
        ">WAITING",
        ">KV CACHE",
        ">LATENCY",
        ">PREDICTED",
        ">SCRAPED",
        "REASON",
    )
    spare = ("PREDICTED", "LATENCY", "SCRAPED", "WAITING", "KV CACHE", "ROLE")
    return fitting(heads, [_instance(each) for each in found], spare, {"REASON": 20})


def models(found: Iterable[Mapping[str, Any]]) -> Table:
    """Return a table of models."""
    made = table("MODEL", "KIND", "STATE", ">P", ">D", "GETS")
    for each in found:
        total = sum(each["targets"].values())
        gets = ", ".join(f"{name} {share(weight / total)}" for name, weight in each["targets"].items())
        style = "green" if each["health"] == "served" else "red"
        alias = each["kind"] == "alias"
        counts = ("", "") if alias else (number(each["prefill"]), number(each["decode"]))
        made.add_row(
            plain(each["name"]),
            each["kind"],
            plain(each["health"], style),
            *counts,
            plain(gets) if gets else "",
        )
    return made


def _in_flight(each: Mapping[str, Any]) -> str:
    """Return the requests on an instance, and how many of them other replicas have sent."""
    elsewhere = each.get("in_flight_elsewhere")
    return number(each["in_flight"]) + (f" ({elsewhere} elsewhere)" if elsewhere else "")


def _instance(each: Mapping[str, Any]) -> tuple[Text | str, ...]:
    predicted = each.get("predicted") or {}
    age = each.get("metrics_age_s")
    return (
        plain(each["id"]),
        each["role"],
        state_of(each),
        _in_flight(each),
        number(each["waiting"]),
        share(each["kv_cache_usage"]),
        seconds(each["latency"]),
        seconds(predicted.get("prefill_left_s", predicted.get("decode_step_s"))),
        "\N{EN DASH}" if age is None else f"{seconds(age)} ago",
        plain(each["reason"]) if each["reason"] else "",
    )


def overview(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the lines of ``GET /status``."""
    ready = "ready" if found["ready"] else "not ready"
    yield plain(
        f"vLLM PD Scheduler {found['version']}, up {long_time(found['uptime_s'])}: {ready}",
        "bold" if found["ready"] else "bold red",
    )
    names, shadow = found["strategy"], found["shadow"]
    same = names["prefill"] == names["decode"]
    shown = names["prefill"] if same else f"prefill {names['prefill']}, decode {names['decode']}"
    yield plain(f"strategy  {shown}" + (f"; shadow {shadow}" if shadow else ""))
    queue = found["queue"]
    held = size(found["held_bytes"])
    elsewhere = queue.get("requests_elsewhere")
    others = f"; {elsewhere} wait at other replicas" if elsewhere else ""
    waits = f"{queue['requests']} requests, {size(queue['bytes'])}{others}"
    yield plain(f"queue     {waits}; bodies held: {held}")
    for role, count in found["roles"].items():
        if role == "encode" and not count["total"]:
            continue
        style = "" if count["routable"] == count["total"] else "yellow" if count["routable"] else "red"
        yield plain(f"{role:<9} {count['routable']} of {count['total']} can serve", style)
    if (replicas := found.get("replicas")) is not None:
        yield from _replicas(replicas)
    for line in found.get("misfits", ()):
        yield plain(line, "yellow")


def _replicas(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the lines of the other replicas."""
    others = [(each["name"] or each["replica"], each) for each in found["others"]]
    names = ", ".join(f"{name} on {each['machine']}" if each["machine"] else name for name, each in others)
    heard = "1 other is heard" if len(others) == 1 else f"{len(others) or 'no'} others are heard"
    yield plain(f"replicas  {heard}" + (f": {names}" if others else ""))
    if not found["connected"]:
        yield plain(f"          not connected: {found['problem']}", "yellow")
    for name, each in others:
        if each["differs"]:
            yield plain(f"replica {name} is configured in another way: the events say how", "yellow")


def show(*parts: RenderableType) -> None:
    """Print for people; a text is one line, however long."""
    out = console()
    for part in parts:
        if isinstance(part, Table):
            out.print(part)
        else:
            out.print(plain(part) if isinstance(part, str) and part else part, soft_wrap=True)
