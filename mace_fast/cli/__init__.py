"""The command line: ``mace-fast convert | verify | info | bench | md | relax``.

Commands import what they work with when they are called: torch and mace-torch take seconds, which nobody who asks for
help, or mistypes an option, should wait for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mace_fast import __version__
from mace_fast.cli.bench import bench
from mace_fast.cli.console import stderr
from mace_fast.cli.md import md
from mace_fast.cli.models import convert, info, verify
from mace_fast.cli.relax import relax
from mace_fast.errors import MaceFastError

app = typer.Typer(
    name="mace-fast",
    help="MACE interatomic potentials at the speed of the hardware.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert, verify, info, bench, md, relax):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mace-fast {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """MACE interatomic potentials at the speed of the hardware."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 0 on success only, 1 for an error, 2 for wrong usage, 130 when
    interrupted.

    An error that mace_fast foresees, or of the file system, is one message on standard error, without a
    traceback.
    """
    try:
        app(args=list(arguments) if arguments is not None else None)
    except (MaceFastError, OSError) as exc:
        stderr.print(f"[bold red]error:[/] {_escaped(exc)}", soft_wrap=True)
        sys.exit(1)


def _escaped(exc: Exception) -> str:
    return str(exc).replace("[", r"\[")
