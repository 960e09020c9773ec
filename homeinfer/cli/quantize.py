"""`homeinfer quantize`: a GGUF made smaller by a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from homeinfer.quant.quantize import Progress, QuantizeResult
from homeinfer.quant.quantize import quantize as quantize_file
from homeinfer.quant.recipes import RECIPES

_INTERRUPTED = 130


def _list_recipes(wanted: bool) -> None:
    if not wanted:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("recipe", "bpw of Llama 3 8B", "imatrix", "what it is"):
        table.add_column(heading, justify="right" if heading.startswith("bpw") else "left")
    for info in RECIPES.values():
        table.add_row(info.name, f"{info.bpw:.2f}", "needed" if info.needs_imatrix else "", info.about)
    Console().print(table)
    raise typer.Exit


def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="The F16 or BF16 model: a GGUF file, or any part of a split one.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The GGUF file to write.")],
    recipe: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"How small, in any case: {', '.join(RECIPES)}. --list-recipes says more."),
    ],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Take a source that is quantized already; some quality is lost.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite DST if it exists.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores unless given.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    _list: Annotated[
        bool,
        typer.Option("--list-recipes", callback=_list_recipes, is_eager=True, help="Show all recipes and exit."),
    ] = False,
) -> None:
    """Make a model smaller: write SRC to DST with fewer bits per weight, as a recipe says.

    The result runs in any llama.cpp. SRC stays as it is; DST appears when it is complete.

    Example: homeinfer quantize model-F16.gguf model.gguf --recipe DQ3_K_M

    Example: homeinfer quantize big-00001-of-00004.gguf small.gguf --recipe Q4_K_M
    """
    errors = Console(stderr=True)
    try:
        with _progress_bar(errors, destination.name) as on_progress:
            result = quantize_file(
                source, destination, recipe, requantize=requantize, force=force, threads=threads,
                on_progress=on_progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("homeinfer: interrupted: nothing was written", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    for note in result.notes:
        errors.print(Text(note, "yellow"), soft_wrap=True)
    typer.echo(msgspec.json.encode(result) if json else _summary(result))


def _summary(result: QuantizeResult) -> str:
    size = decimal(result.size_bytes, precision=2)
    return f"{result.path}: {result.recipe}, {size}, {result.bpw:.2f} bpw, {result.seconds:.1f} s"


@contextlib.contextmanager
def _progress_bar(console: Console, name: str) -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left, shown only on a terminal and gone at the end."""
    bar = ProgressBar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[tensor]}", markup=False, style="dim"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(name, total=1.0, tensor="")

        def show(progress: Progress) -> None:
            tensor = f"{progress.index}/{progress.count} {progress.tensor}"
            bar.update(task, completed=progress.fraction, tensor=tensor)

        yield show
