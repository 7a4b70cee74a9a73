"""The command ``generate``, which writes a made-up load for ``replay``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer


def generate(
    shape: Annotated[
        str,
        typer.Argument(metavar="SHAPE", help="What it is like; a wrong one names all.", show_default=False),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.", show_default=False)],
    requests: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="About so many, one a second on average.")
    ] = 5000,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
) -> None:
    """Write a made-up load of a stated shape as a trace for `replay`: the same seed gives the same file."""
    from ..replay.load import lines
    from ..replay.shapes import make

    try:
        trace = make(shape, requests, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="SHAPE") from None
    try:
        with file.open("xb") as out:
            out.write(lines(trace))
    except FileExistsError:
        raise typer.BadParameter(f"{file} exists: choose another name", param_hint="FILE") from None
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}", param_hint="FILE") from None
    typer.echo(f"{len(trace.requests)} requests are in {file}.", err=True)
    typer.echo(f"vllm-pd-scheduler replay --trace {shlex.quote(os.fspath(file))} …", err=True)
