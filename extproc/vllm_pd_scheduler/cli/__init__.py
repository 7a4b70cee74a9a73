"""The command line: ``vllm-pd-scheduler`` and ``python -m vllm_pd_scheduler``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .envoy_config import envoy_config
from .options import IntervalOption, LogFormatOption, LogLevel, LogLevelOption, ShadowOption
from .replay import replay
from .serving import check, serve, up
from .simulation import demo, sim

app = typer.Typer(
    help="Routes requests to a vLLM fleet whose prefill and decode run on separate instances.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", help="JSON configuration file.")] = None,
    interval: IntervalOption = None,
    shadow: ShadowOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
    log_format: LogFormatOption = None,
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


for command in (serve, up, check, envoy_config, sim, demo, replay):
    app.command()(command)


def main() -> None:
    """Run the command line: the entry point of the console script."""
    app(prog_name="vllm-pd-scheduler")
