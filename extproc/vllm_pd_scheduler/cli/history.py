"""The commands that tell of the past: ``decisions``, ``explain`` and ``events``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ..models import PD_ROLES
from .client import UNREACHABLE, AdminClient, Failure
from .connection import JsonOption, connected
from .tables import LEVEL_STYLES, console, fitting, local_time, plain, seconds, show, table

FOLLOW_S = 1.0
"""Seconds between two looks for new decisions."""

LimitOption = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many of the newest.")]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on with those to come, until Ctrl-C.")]


@connected
def decisions(
    client: AdminClient,
    limit: LimitOption = 20,
    follow: FollowOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show which instances the latest requests got; `explain` says why."""
    text = client.get("/decisions", limit=limit)
    found = client.parsed(text)["decisions"]
    if not follow:
        if as_json:
            typer.echo(text)
        else:
            show(_decisions(found))
        return
    with suppress(KeyboardInterrupt):
        _follow_decisions(client, found, as_json)


def _follow_decisions(client: AdminClient, found: list[dict[str, Any]], as_json: bool) -> None:
    """Print those that there are, then once a second those that are new, a line each."""
    out, last = console(), 0
    while True:
        for each in reversed(found):
            if as_json:
                typer.echo(json.dumps(each))
            else:
                out.print(Text("  ").join(_cells(each)), soft_wrap=True)
        if found:
            last = found[0]["number"]
        time.sleep(FOLLOW_S)
        found = client.parsed(client.get("/decisions", since=last))["decisions"]


def _decisions(found: list[dict[str, Any]]) -> Table:
    heads = (
        "DATE",
        "TIME",
        "REQUEST",
        "MODEL",
        ">PROMPT",
        "SERVED",
        "INSTANCES",
        ">FIRST TOKEN",
        ">PREDICTED",
        "STATUS",
        "END",
    )
    spare = ("DATE", "MODEL", "PROMPT", "PREDICTED", "SERVED", "FIRST TOKEN", "END")
    return fitting(heads, [_cells(each) for each in found], spare, {"REQUEST": 36, "STATUS": 10})


def _cells(each: Mapping[str, Any]) -> list[Text]:
    legs = [leg["picked"] or "none" for role in PD_ROLES if (leg := each.get(role)) is not None]
    date, _, time_of_day = local_time(each["time"]).partition(" ")
    failed = each["status"] is not None and each["status"] >= 400
    reason = f" {each['reason']}" if each["reason"] else ""
    return [
        plain(date),
        plain(time_of_day),
        plain(each["request_id"]),
        plain(each["model"]),
        plain(each["prompt_tokens"]),
        plain(each["served"]),
        plain(" \N{RIGHTWARDS ARROW} ".join(legs)),
        plain(seconds(each["ttft_s"])),
        plain(seconds(each["predicted_ttft_s"])),
        plain(f"{each['status']}{reason}" if each["status"] else None, "red" if failed else ""),
        plain(each["outcome"]),
    ]


@connected
def explain(
    client: AdminClient,
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="The request's x-request-id.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Show why a request got its instances: who was asked, what counted, and what became of it."""
    text = client.get("/decisions", request_id=request_id)
    found = client.parsed(text)["decisions"]
    if not found:
        shown = plain(request_id).plain
        raise Failure(f"no decision about the request {shown} is remembered; only the last 1,000 are")
    if as_json:
        typer.echo(text)
        return
    for each in reversed(found):
        show(*_explanation(each))


_NOT_SPLIT = {
    "connector": "a connector of P does not split such a request",
    "no_model": "it names no model, and there are several",
    "disaggregation": "disaggregation has a D serve it alone",
    "prefill": "no P has handed it over",
    "late": "the hand-off was too old",
    "splice": "the hand-off does not go into D's request",
    "no_decode": "no D can take P's hand-off",
}
"""Words for what ``not_split`` says."""


def _explanation(each: Mapping[str, Any]) -> Iterator[RenderableType]:
    kind = "a stream" if each["stream"] else "not streamed"
    model = f"model {each['model']}" if each["model"] else "no model named"
    yield plain(f"{each['request_id']}: {local_time(each['time'])}, {each['path']}, {model}", "bold")
    tokens = f"{each['prompt_tokens']} prompt tokens, {kind}"
    why = each.get("not_split")  # a scheduler of an older version does not say
    served = f"served {each['served']}" + (f", not split: {_NOT_SPLIT.get(why, why)}" if why else "")
    if (rest := each.get("continues")) is not None:
        failed = rest["decode"] or "a D"
        yield plain(f"  goes on with the answer of {failed}, which failed it after {rest['tokens']} tokens")
    yield plain(f"  {tokens}; {served}; waited {seconds(each['waited_s'])} for an instance")
    ended = [f"status {each['status']}"] if each["status"] else []
    ended += [plain(text).plain for text in (each["reason"], each["outcome"]) if text]
    ended += [f"after {seconds(each['duration_s'])}"] if each["duration_s"] is not None else []
    yield plain(f"  {', '.join(ended) or 'not ended'}")
    if each["ttft_s"] is not None or each["predicted_ttft_s"] is not None:
        predicted = seconds(each["predicted_ttft_s"])
        yield plain(f"  first token after {seconds(each['ttft_s'])}; predicted {predicted}")
    if (encode := each.get("encode")) is not None:
        yield ""
        items = f"{encode['encoded']} of {encode['items']} items encoded"
        yield plain(f"encode: {items}; took {seconds(encode['took_s'])}", "bold")
        yield from _tried(encode["attempts"])
    for role in PD_ROLES:
        if (leg := each.get(role)) is not None:
            yield ""
            yield from _leg(role, leg)
    yield ""


def _leg(role: str, leg: Mapping[str, Any]) -> Iterator[RenderableType]:
    took = [f"predicted {seconds(leg['predicted_s'])}"] if leg.get("predicted_s") is not None else []
    took += [f"took {seconds(leg['took_s'])}"] if leg.get("took_s") is not None else []
    candidates, rule = leg["candidates"], leg.get("by", "strategy")
    chose = leg["strategy"] if rule == "strategy" else f"{rule} (strategy: {leg['strategy'] or 'none'})"
    head = f"{role}: {chose} picked {leg['picked'] or 'none'}"
    yield plain("; ".join([head, *took]), "bold")
    if (source := leg.get("source")) is not None:
        yield plain(f"  told to pull {source['tokens']} prompt tokens from {source['instance']}")
    terms = list(dict.fromkeys(name for each in candidates for name in each.get("terms") or {}))
    made = table("", "CANDIDATE", ">SCORE", *(f">{plain(name).plain.upper()}" for name in terms))
    for each in candidates:
        values = [each.get("score"), *((each.get("terms") or {}).get(name) for name in terms)]
        mark = "\N{RIGHTWARDS ARROW}" if each["id"] == leg["picked"] else ""
        made.add_row(mark, plain(each["id"]), *(plain(_figure(value)) for value in values))
    if candidates:
        yield made
    if leg.get("of", 0) > len(candidates):
        yield plain(f"  of {leg['of']} candidates these are the best")
    for reason, ids in leg["left_out"].items():
        if ids:
            yield plain(f"  left out, {reason}: {', '.join(ids)}")
    yield from _tried(leg["attempts"])


def _tried(attempts: Iterable[Mapping[str, Any]]) -> Iterator[RenderableType]:
    for attempt in attempts:
        outcome = attempt["outcome"]
        style = "" if outcome in ("ok", None) else "yellow"
        yield plain(f"  tried {attempt['instance']}: {outcome or 'not ended'}", style)


def _figure(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(str(_figure(each)) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else value


@connected
def events(
    client: AdminClient,
    limit: LimitOption = 50,
    follow: FollowOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what has happened lately to the fleet and the scheduler, and who did it; the newest last."""
    text = client.get("/events", limit=limit)
    if as_json and not follow:
        typer.echo(text)
        return
    found = client.parsed(text)["events"]
    out = console()
    for each in reversed(found):
        _print_event(out, each, as_json)
    if not follow:
        return
    last = found[0]["number"] if found else 0
    with suppress(KeyboardInterrupt):
        for data in client.stream("/events", since=last):
            _print_event(out, client.parsed(data.encode()), as_json)
        raise Failure(f"the scheduler at {client.url} has ended the stream: it stops", UNREACHABLE)


def _print_event(out: Console, event: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(event))
        return
    level = event["level"]
    line = Text("  ").join(
        (
            plain(local_time(event["time"]), "dim"),
            plain(f"{level:<7}", LEVEL_STYLES.get(level, "")),
            plain(event["text"]),
            plain(f"by {event['by']}", "dim"),
        )
    )
    out.print(line, soft_wrap=True)
