"""The command ``record``, which writes the fleet's own traffic as a trace for ``replay``."""

from __future__ import annotations

import os
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .client import AdminClient, Failure
from .connection import connected


@connected
def record(
    client: AdminClient,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.", show_default=False)],
    seconds: Annotated[
        float | None, typer.Option("--for", min=1, max=604_800, help="Seconds; without it, until Ctrl-C.")
    ] = None,
) -> None:
    """Write a line for each request whose answer ends, for `replay`: times, lengths and hashes, no text."""
    try:
        out = file.open("x", buffering=1, encoding="utf-8")  # a line at a time
    except FileExistsError:
        raise typer.BadParameter(f"{file} exists: choose another name", param_hint="FILE") from None
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}", param_hint="FILE") from None
    lines = 0
    end = None if seconds is None else time.monotonic() + seconds
    with out, suppress(KeyboardInterrupt):
        try:
            for line in client.stream("/trace", until=end):
                out.write(line + "\n")
                lines += 1
        except Failure as failure:
            if not lines:
                file.unlink()
                raise
            raise Failure(f"{failure}. {lines} requests are in {file}", failure.status) from None
    if not lines:
        file.unlink()
        typer.echo(f"No request has ended, so there is no {file}.", err=True)
        return
    typer.echo(f"{lines} requests are in {file}.", err=True)
    typer.echo(f"vllm-pd-scheduler replay --trace {shlex.quote(os.fspath(file))} …", err=True)
