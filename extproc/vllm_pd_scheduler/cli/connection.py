"""What the operators' commands share: which scheduler they ask, and how they fail."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from .client import AdminClient, Failure

DEFAULT_URL = "http://127.0.0.1:9003"
TOKEN_VARIABLE = "PD_SCHEDULER_TOKEN"

_UrlOption = Annotated[
    str, typer.Option("--url", envvar="PD_SCHEDULER_URL", help="The scheduler's admin interface.")
]
_TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file", help=f"File with the admin token. Without it, {TOKEN_VARIABLE} may hold the token."
    ),
]
_CaFileOption = Annotated[
    Path | None,
    typer.Option(
        "--ca-file", envvar="PD_SCHEDULER_CA_FILE", help="CA of the admin interface's certificate, PEM."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the scheduler's JSON as it is.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Even the last instance of its role that can serve.")
]


def _ids(context: typer.Context, incomplete: str) -> list[str]:
    """Return the ids of instances for a shell's completion; none if there is no scheduler to ask."""
    given = context.params
    try:
        url = given.get("url") or os.environ.get("PD_SCHEDULER_URL") or DEFAULT_URL
        client = _client(url, given.get("token_file"), given.get("ca_file"))
        found = client.parsed(client.get("/instances"))["instances"]
        return [each["id"] for each in found if each["id"].startswith(incomplete)]
    except (typer.BadParameter, Failure, KeyError, TypeError):
        return []


IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The instance's id.", autocompletion=_ids, show_default=False)
]


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has the options that say which scheduler to ask, in place of the client.

    ``command`` gets that client first. A failure in it goes to stderr and ends the program.
    """

    def asking(
        *,
        url: _UrlOption = DEFAULT_URL,
        token_file: _TokenFileOption = None,
        ca_file: _CaFileOption = None,
        **own: Any,
    ) -> None:
        with _connected(url, token_file, ca_file) as client:
            command(client, **own)

    _, *own = signature(command, eval_str=True).parameters.values()
    *options, _ = signature(asking, eval_str=True).parameters.values()
    update_wrapper(asking, command)
    both = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*own, *options)]
    asking.__signature__ = Signature(both)  # type: ignore[attr-defined]
    asking.__annotations__ = {each.name: each.annotation for each in both}
    return asking


@contextmanager
def _connected(url: str, token_file: Path | None, ca_file: Path | None) -> Iterator[AdminClient]:
    client = _client(url, token_file, ca_file)
    try:
        yield client
    except Failure as failure:
        typer.echo(f"vllm-pd-scheduler: {failure}", err=True)
        raise typer.Exit(failure.status) from None


def _client(url: str, token_file: Path | None, ca_file: Path | None) -> AdminClient:
    try:
        return AdminClient(url, _token(token_file), _trusted(ca_file))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None


def _token(file: Path | None) -> str | None:
    if file is None and not os.environ.get(TOKEN_VARIABLE):
        return None
    from ..config.instances import SecretSource  # see options.py

    source = SecretSource(env=TOKEN_VARIABLE) if file is None else SecretSource(file=str(file))
    try:
        return source.read()
    except ValueError as error:
        hint = TOKEN_VARIABLE if file is None else "--token-file"
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _trusted(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # an SSLError is one too
        reason = "not a certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise typer.BadParameter(f"{ca_file}: {reason}", param_hint="--ca-file") from None
