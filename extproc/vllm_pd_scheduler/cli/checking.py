"""The command ``self-check``: whether D answer the same with hand-offs as without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .client import REFUSED, AdminClient
from .connection import JsonOption, connected
from .tables import plain, show, table


@connected
def self_check(
    client: AdminClient,
    prefill: Annotated[
        str | None, typer.Argument(metavar="PREFILL", help="Id of the P of the pair to check.")
    ] = None,
    decode: Annotated[str | None, typer.Argument(metavar="DECODE", help="Id of its D.")] = None,
    last: Annotated[bool, typer.Option("--last", help="Show what the last checks have found.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check now whether a pair's hand-offs give right texts: those named, or of each model the next."""
    if (prefill is None) is not (decode is None) or (last and prefill is not None):
        raise typer.BadParameter("give the ids of a P and of a D, or none", param_hint="PREFILL DECODE")
    if last:
        text = client.get("/self-check")
    else:
        query = {"prefill": prefill, "decode": decode}
        text = client.ask("POST", "/self-check", query, timeout=None)
    found = client.parsed(text)
    if as_json:
        typer.echo(text)
    else:
        _print(found, last)
    wrong_now = not last and any(each["result"] == "mismatch" for each in found["checks"])
    if found["left_out"] or wrong_now:
        raise typer.Exit(REFUSED)


def _print(found: Mapping[str, Any], last: bool) -> None:
    made = table("TIME", "MODEL", "PREFILL", "DECODE", "RESULT", ">TRIES", "WHY")
    styles = {"match": "green", "mismatch": "red", "failed": "yellow"}
    for each in found["checks"]:
        cells = (plain(each[key]) for key in ("time", "model", "prefill", "decode"))
        result = plain(each["result"], styles.get(each["result"], ""))
        made.add_row(*cells, result, plain(each["tries"]), plain(each["reason"]))
    if found["checks"]:
        show(made)
    else:
        show("nothing was checked" if last else "nothing to check: no model is known that a P and a D serve")
    for pair in found["left_out"]:
        show(plain(f"left out: {pair['prefill']} to {pair['decode']}: {pair['why']}", "red"))
