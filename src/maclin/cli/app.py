"""The application: its commands, and how errors reach a person."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import maclin

from . import console
from .arena import app as arena
from .bench import app as bench
from .convert import convert
from .diagnose import diagnose
from .heal import heal
from .mechanisms import mechanisms
from .plan import plan
from .poc import poc
from .roi import roi
from .study import app as study

app = typer.Typer(
    name="maclin",
    help="Linear-complexity attention for Transformers, and in numbers what it costs and saves.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(poc)
app.command()(plan)
app.command()(diagnose)
app.command()(convert)
app.command()(heal)
app.command()(roi)
app.command()(mechanisms)
app.add_typer(study)
app.add_typer(bench)
app.add_typer(arena)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"maclin {maclin.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    """Options of every command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its status: 0, 1 for a failure, 2 for a wrong call, 130 after Ctrl-C.

    An error is one sentence on stderr; ``--debug``, anywhere, shows the traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        status = app(_repeat_data([a for a in given if a != "--debug"]) or ["--help"], standalone_mode=False)
        if status == console.INTERRUPTED:  # typer makes this of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(status if isinstance(status, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        console.error("interrupted; nothing was written")
        sys.exit(console.INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        sys.exit(console.explain(error))


def _repeat_data(arguments: list[str]) -> list[str]:
    """``--data a b c``, as a shell makes it of ``--data *.txt``, as the option once per file."""
    out: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in ("--data", "--documents") else ""
        elif option and out[-1] != option:
            out.append(option)
        out.append(argument)
    return out
