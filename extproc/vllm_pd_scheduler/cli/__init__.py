"""The command line: ``vllm-pd-scheduler`` and ``python -m vllm_pd_scheduler``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .advising import advise
from .checking import self_check
from .drain_envoy import drain_envoy
from .envoy_config import envoy_config
from .epp import GoCommand, epp
from .generate import generate
from .history import decisions, events, explain
from .operating import add, drain, reload, remove, status, strategy, turn, undrain
from .options import IntervalOption, LogFormatOption, LogLevel, LogLevelOption, ShadowOption
from .recording import record
from .replay import replay
from .serving import check, serve, up, worker
from .simulation import demo, sim
from .top import top

app = typer.Typer(
    help="Routes requests to a vLLM fleet whose prefill and decode run on separate instances.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-pd-scheduler {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", help="JSON configuration file.")] = None,
    interval: IntervalOption = None,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
    log_format: LogFormatOption = None,
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Run ``serve`` if no command is named."""
    if context.invoked_subcommand is not None:
        if config is not None or interval is not None or shadow is not None:
            raise typer.BadParameter(f"give the options after {context.invoked_subcommand!r}")
        return
    if config is None:
        typer.echo(context.get_help())
        typer.echo("\nvllm-pd-scheduler: a command, or --config FILE to serve, is needed", err=True)
        raise typer.Exit(2)
    serve(config, interval, shadow, log_level, log_format)


_PANELS = {
    "Run": (serve, up, check, envoy_config, drain_envoy),
    "Operate": (
        status,
        top,
        strategy,
        drain,
        undrain,
        turn,
        add,
        remove,
        reload,
        self_check,
        decisions,
        explain,
        events,
        advise,
        record,
    ),
    "Try out": (demo, sim, replay, generate),
}
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command(rich_help_panel="Run", cls=GoCommand)(epp)
app.command(hidden=True)(worker)


def main() -> None:
    """Run the command line: the entry point of the console script."""
    app(prog_name="vllm-pd-scheduler")
