"""The command ``advise``: whether the fleet should have another number of P and D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .client import REFUSED, AdminClient
from .connection import JsonOption, connected
from .tables import plain, show, table

TIMEOUT_S = 400.0
"""How long an answer may take: two replays, if another one is being worked out."""


@connected
def advise(
    client: AdminClient,
    minutes: Annotated[
        float, typer.Option("--minutes", min=1, max=15, help="Of traffic, the newest, to replay.")
    ] = 5.0,
    prefill: Annotated[
        int | None, typer.Option("--prefill", min=1, max=256, help="P of another fleet to compare.")
    ] = None,
    decode: Annotated[int | None, typer.Option("--decode", min=1, max=256, help="Its D.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether another number of P and D would serve the last minutes' traffic better, and why."""
    if (prefill is None) is not (decode is None):
        raise typer.BadParameter("give both --prefill and --decode, or neither", param_hint="--prefill")
    query = {"minutes": minutes, "prefill": prefill, "decode": decode}
    text = client.ask("GET", "/advice", query, timeout=TIMEOUT_S)
    found = client.parsed(text)
    if as_json:
        typer.echo(text)
    else:
        _print(found)
    if found["advice"] == "unknown":
        raise typer.Exit(REFUSED)


def _print(found: Mapping[str, Any]) -> None:
    styles = {"move": "yellow", "keep": "green"}
    show(plain(found["text"], styles.get(found["advice"], "")))
    for reason in found["why"]:
        show(plain(f"- {reason}"))
    if not found["fleets"]:
        return
    made = table(
        ">P", ">D", ">P90 TTFT s", ">P90 TPOT ms", ">IN LIMITS %", ">P BUSY %", ">D KV %", ">REFUSED"
    )
    for each in found["fleets"]:
        made.add_row(
            *(plain(each[role]) for role in ("prefill", "decode")),
            _number(each["ttft_p90_s"], 1.0, ".3f"),
            _number(each["tpot_p90_s"], 1000.0, ".1f"),
            *(_number(each[key], 100.0, ".1f") for key in ("in_limits", "prefill_busy", "decode_kv_usage")),
            plain(each["rejected"]),
        )
    show("", made)


def _number(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(value * scale, form)
