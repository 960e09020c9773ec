"""Options that several commands have, and what is said of wrong ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from homeinfer.model.records import printable

_WRONG_USAGE = 2
_INTERRUPTED = 130

ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        help="A GGUF file (of a split one: any part). Default: the embedded SmolLM2-135M.", show_default=False
    ),
]


def json_option(panel: str | None = None) -> Any:
    return typer.Option("--json", help="Print one JSON object.", rich_help_panel=panel)


JsonOption = Annotated[bool, json_option()]


def required(panel: str) -> Any:
    return typer.Option("--require", metavar="DEVICE", help="This device must take part.", rich_help_panel=panel)


def forbidden(panel: str) -> Any:
    return typer.Option("--forbid", metavar="DEVICE", help="This device must not take part.", rich_help_panel=panel)


def objective(panel: str) -> Any:
    return typer.Option(
        "--objective",
        help="latency: the least time per token; throughput: the most tokens per second of all answers together; "
        "ttft: the first token soonest.",
        rich_help_panel=panel,
    )


def rounds(panel: str) -> Any:
    return typer.Option(
        "--rounds",
        metavar="N",
        min=0,
        max=16,
        help="How often a token goes around: each device gets so many windows; 0: as many as are fastest. The head "
        "alone has one.",
        rich_help_panel=panel,
    )


def headroom(panel: str) -> Any:
    return typer.Option(
        "--headroom",
        metavar="SHARE",
        help="The share of each device's memory that stays free for your other programs.",
        rich_help_panel=panel,
    )


def parse_headroom(text: str) -> float:
    """ "10%" or "0.1" as a share; exits with 2 for anything else."""
    plain = text.strip()
    try:
        share = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        wrong_usage(f"--headroom: '{printable(text, 40)}' is no share; write 10% or 0.1, less than 100%")
    return share


def wrong_usage(line: str) -> NoReturn:
    """Say what is wrong with the command line, in one line, and leave with exit code 2."""
    typer.echo(f"homeinfer: {' '.join(line.split())}", err=True)
    raise typer.Exit(_WRONG_USAGE)


@contextlib.contextmanager
def interruptible(remark: str | Callable[[], str] = "") -> Iterator[None]:
    """Ctrl-C meanwhile: say so, and what that means, in one line, and leave with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        means = remark if isinstance(remark, str) else remark()
        typer.echo(f"homeinfer: interrupted{means and ': '}{means}", err=True)
        raise typer.Exit(_INTERRUPTED) from None
