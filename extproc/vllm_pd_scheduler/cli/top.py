"""``top``: the fleet, live."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live

from .client import AdminClient, Failure
from .connection import connected
from .tables import console, instances, overview, plain, show

INTERVAL_S = 1.0
"""Seconds between two looks."""

_OTHER_LINES = 12
"""Of the screen, which are not rows of the table."""

_LEAVE = frozenset("qQ\x04")


@connected
def top(
    client: AdminClient,
) -> None:
    """Show the fleet live, the busiest instances first. Ends with q or Ctrl-C; in a pipe it prints once."""
    out = console()
    first = _look(client)
    if not out.is_terminal or out.is_dumb_terminal:
        show(*_parts(first, None))
        return
    with suppress(KeyboardInterrupt), _keys() as pressed:
        _follow(client, out, first, pressed)


class _Look:
    """What the scheduler said at one moment."""

    def __init__(self, status: Mapping[str, Any], fleet: list[dict[str, Any]]) -> None:
        self.status = status
        self.fleet = sorted(fleet, key=lambda each: (each["role"] == "decode", -each["requests"]))


def _look(client: AdminClient) -> _Look:
    status = client.parsed(client.get("/status"))
    return _Look(status, client.parsed(client.get("/instances"))["instances"])


def _follow(client: AdminClient, out: Console, look: _Look, pressed: Callable[[float], str]) -> None:
    """Show one look after another; when one fails, the last, and why there is no newer."""
    problem: RenderableType = plain(f"{client.url}; q ends", "dim")
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.update(Group(*_parts(look, out.height - _OTHER_LINES), "", problem), refresh=True)
            if pressed(INTERVAL_S) in _LEAVE:
                return
            try:
                look = _look(client)
                problem = plain(f"{client.url}; q ends", "dim")
            except Failure as failure:
                problem = plain(f"{failure}; this is what was seen last", "red")


def _parts(look: _Look, rows: int | None) -> Iterator[RenderableType]:
    yield from overview(look.status)
    yield ""
    shown = look.fleet if rows is None else _some(look.fleet, max(rows, 4))
    yield instances(shown)
    if len(shown) < len(look.fleet):
        yield plain(f"and {len(look.fleet) - len(shown)} more instances", "dim")


def _some(fleet: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """Return as many as there is room for; of each role a fair part."""
    prefill = [each for each in fleet if each["role"] != "decode"]
    decode = [each for each in fleet if each["role"] == "decode"]
    first = min(len(prefill), max(rows // 2, rows - len(decode)))
    return prefill[:first] + decode[: rows - first]


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield what waits for a key for some seconds, and returns it, or nothing."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios  # not there on every system, where nobody needs it without a terminal
    import tty

    terminal = sys.stdin.fileno()

    def pressed(seconds: float) -> str:
        if not select.select([terminal], [], [], seconds)[0]:
            return ""
        return os.read(terminal, 1).decode(errors="replace") or "q"  # nothing: the terminal is gone

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)  # keys come at once, and Ctrl-C goes on to interrupt
    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
