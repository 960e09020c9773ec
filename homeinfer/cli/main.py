"""The `homeinfer` command."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.models import CommandInfo

from homeinfer import __version__
from homeinfer.errors import HomeinferError

_COMMANDS = ("chat", "run", "cluster", "bench", "quantize", "imatrix", "evaluate", "profile", "plan", "model")


class _Commands(TyperGroup):
    """Imports a command when it is asked for: `homeinfer quantize` starts without what chat needs."""

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        function = getattr(importlib.import_module(f"homeinfer.cli.{cmd_name}"), cmd_name)
        if isinstance(function, typer.Typer):
            for each in function.registered_commands:
                each.help = _paragraphs(each.callback)
            return typer.main.get_group(function)
        info = CommandInfo(name=cmd_name, callback=function, help=_paragraphs(function))
        return typer.main.get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode="rich")


def _paragraphs(function: Any) -> str:
    """Its docstring without the line ends of the source; what is indented stays as it is."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else " ".join(p.split()) for p in paragraphs)


app = typer.Typer(
    name="homeinfer",
    cls=_Commands,
    help="Runs language models too big for any one machine at home on all of them together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"homeinfer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Runs language models too big for any one machine at home on all of them together."""


def main() -> NoReturn:
    """Entry point: exit code 0, 1 with one line on standard error, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        app()
    except HomeinferError as problem:
        line = " ".join(str(problem).split())
        print(f"homeinfer: {line}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # whoever read our output has left; keep Python from complaining about the same once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
