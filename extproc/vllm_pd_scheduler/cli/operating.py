"""The commands that show a fleet and steer it: ``status``, ``strategy``, ``drain``, ``add`` and the like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ..models import MAX_RANKS, PD_ROLES, InstanceRole, join_address
from .client import REFUSED, TIMEOUT_S, AdminClient, Failure, instance_path
from .connection import ForceOption, IdArgument, JsonOption, connected
from .tables import instances, models, overview, show

RELOAD_S = 60.0
"""How long a reload may take: it reads files, and tries the strategies."""

_MOST_ROWS = 40
"""Instances that ``status`` shows; of a larger fleet only those that do not serve as they should."""


@connected
def status(
    client: AdminClient,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show each instance, also of a large fleet.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how the scheduler and its instances are."""
    text = client.get("/status")
    if as_json:
        typer.echo(text)
        return
    show(*overview(client.parsed(text)))
    found = client.parsed(client.get("/instances"))["instances"]
    if len({name for each in found for name in each.get("models") or ()}) > 1:
        named = client.parsed(client.get("/models"))["models"]
        show("", models(named if show_all else named[:_MOST_ROWS]))
    shown = found
    if len(found) > _MOST_ROWS and not show_all:
        shown = [each for each in found if each.get("shown_state", each["state"]) != "healthy"]
    show("", instances(shown))
    if len(shown) < len(found):
        show("", f"{len(found) - len(shown)} healthy instances are not shown: --all shows them")


@connected
def strategy(
    client: AdminClient,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Use this one from now on.")] = None,
    role: Annotated[InstanceRole | None, typer.Option("--role", help="Change it for one role.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the strategies in use, or change them for the requests to come."""
    if role is not None and name is None:
        raise typer.BadParameter("give the strategy's NAME too", param_hint="--role")
    if name is None:
        text = client.get("/strategy")
    else:
        key = "strategy" if role is None else f"{role}_strategy"
        text = client.ask("PUT", "/strategy", body={key: name})
    if as_json:
        typer.echo(text)
        return
    found = client.parsed(text)
    for each in PD_ROLES:
        show(f"{each:<10} {found[f'{each}_strategy']}")
    if name is None:
        show(f"there are   {', '.join(found['available'])}")


@connected
def drain(
    client: AdminClient,
    instance: IdArgument,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="End when nothing is left there; 1 if something is after drain_timeout."),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send an instance no new requests; those that run there go on."""
    query = {"wait": "true" if wait else None, "force": "true" if force else None}
    path = instance_path(instance, "/drain")
    text = _forced(client, "POST", path, query, timeout=None if wait else TIMEOUT_S)
    found = client.parsed(text)
    if as_json:
        typer.echo(text)
    elif found["drained"]:
        show(f"{instance} is drained")
    else:
        show(f"{instance} is {found['state']}: {_left(found)}")
    if wait and not found["drained"]:
        raise typer.Exit(REFUSED)


def _left(found: Mapping[str, Any]) -> str:
    handoffs = f", {found['pending_handoffs']} hand-offs" if found["pending_handoffs"] else ""
    elsewhere = found.get("in_flight_elsewhere")
    others = f" ({elsewhere} of other replicas)" if elsewhere else ""
    return f"{found['in_flight']} requests{others}{handoffs} are left there"


@connected
def turn(
    client: AdminClient,
    instance: IdArgument,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="End when it has the other role; 1 if it has not after drain_timeout."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Give an instance the other role: P becomes D, or D becomes P, when nothing is left on it."""
    role = client.parsed(client.get(instance_path(instance)))["role"]
    query = {"wait": "true" if wait else None}
    text = client.ask("POST", instance_path(instance, "/turn"), query, timeout=None if wait else TIMEOUT_S)
    found = client.parsed(text)
    turned = found["role"] != role
    if as_json:
        typer.echo(text)
    elif turned:
        show(f"{instance} is a {found['role']} instance now")
    else:
        show(f"{instance} is {found['state']}, to be turned then: {_left(found)}")
    if wait and not turned:
        raise typer.Exit(REFUSED)


@connected
def undrain(
    client: AdminClient,
    instance: IdArgument,
    as_json: JsonOption = False,
) -> None:
    """Send an instance requests again."""
    _show_one(client, client.ask("POST", instance_path(instance, "/undrain")), as_json)


@connected
def add(
    client: AdminClient,
    instance: Annotated[str, typer.Argument(metavar="ID", help="A name of your choice.")],
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where its vLLM serves.")],
    role: Annotated[InstanceRole, typer.Option("--role", help="What the fleet uses it for.")],
    server_name: Annotated[
        str | None, typer.Option("--server-name", help="DNS name in its certificate, with instance_tls.")
    ] = None,
    data_parallel_size: Annotated[
        int, typer.Option("--data-parallel-size", min=1, max=MAX_RANKS, help="Engines behind its one port.")
    ] = 1,
    both_roles: Annotated[
        bool, typer.Option("--both-roles", help="It can be P and D, so that it may be turned.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add an instance. It gets requests when a health check has succeeded."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()):
        raise typer.BadParameter(f"{address!r} is not HOST:PORT", param_hint="HOST:PORT")
    body: dict[str, object] = {"id": instance, "role": role, "host": host, "port": int(port)}
    if both_roles:
        body["both_roles"] = True
    if server_name is not None:
        body["server_name"] = server_name
    if data_parallel_size > 1:
        body["data_parallel_size"] = data_parallel_size
    _show_one(client, client.ask("POST", "/instances", body=body), as_json)


@connected
def remove(
    client: AdminClient,
    instance: IdArgument,
    force: ForceOption = False,
) -> None:
    """Forget an instance; requests that run there go on. Drain it first to see them end."""
    _forced(client, "DELETE", instance_path(instance), {"force": "true" if force else None})
    show(f"{instance} was removed")


@connected
def reload(
    client: AdminClient,
    as_json: JsonOption = False,
) -> None:
    """Have the configuration read again; say what has changed, and what needs a restart."""
    text = client.ask("POST", "/reload", timeout=RELOAD_S)
    if as_json:
        typer.echo(text)
        return
    found = client.parsed(text)
    show(f"changed: {', '.join(found['changed']) or 'nothing'}")
    if found["needs_restart"]:
        show(f"needs a restart: {', '.join(found['needs_restart'])}")


def _forced(
    client: AdminClient,
    method: str,
    path: str,
    query: Mapping[str, object],
    timeout: float | None = TIMEOUT_S,
) -> bytes:
    """Ask for what the scheduler refuses of a role's last instance, and say how it does it all the same."""
    try:
        return client.ask(method, path, query, timeout=timeout)
    except Failure as failure:
        raise Failure(str(failure).replace("force=true", "--force"), failure.status) from None


def _show_one(client: AdminClient, text: bytes, as_json: bool) -> None:
    if as_json:
        typer.echo(text)
        return
    found = client.parsed(text)
    reason = f": {found['reason']}" if found["reason"] else ""
    address = join_address(found["host"], found["port"])
    show(f"{found['id']} ({found['role']}, {address}) is {found['state']}{reason}")
