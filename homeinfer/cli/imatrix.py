"""`homeinfer imatrix`: how much each input channel of each weight counts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from homeinfer.cli.bars import fraction_bar
from homeinfer.cli.shared_options import JsonOption, interruptible
from homeinfer.cli.ui import notes
from homeinfer.model.header import read_header
from homeinfer.quant.calibrate import CHUNK_SIZE, Calibration, calibrate
from homeinfer.quant.checks import checked_destination
from homeinfer.quant.imatrix import unreached, write_imatrix


class ImatrixResult(msgspec.Struct, frozen=True):
    """What `homeinfer imatrix --json` prints; unreached are experts that no token reached, by tensor."""

    path: str
    chunks: int
    tokens: int
    tensors: int
    unreached: dict[str, int]
    seconds: float


def imatrix(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The model to run: a GGUF file, or any part of a split one.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The imatrix to write.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="UTF-8 text to read; may be given again. Default: a text of Python's own."),
    ] = None,
    ctx: Annotated[int, typer.Option(min=16, max=1 << 17, help="Tokens in a chunk.")] = CHUNK_SIZE,
    chunks: Annotated[int | None, typer.Option(min=1, help="Only so many chunks; default: the whole text.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores unless given.")] = None,
    output_tensor: Annotated[
        bool, typer.Option(help="Also what goes into the output matrix (the embedding, where both are one).")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure how much each input of each weight counts, by letting the model read a text.

    With the importance matrix (imatrix), homeinfer quantize and llama-quantize make better small models. Take text
    like what the model is used for; some 30,000 tokens are enough for a dense model, mixtures want more.

    Example: homeinfer imatrix model-F16.gguf -o model.imatrix.gguf

    Example: homeinfer imatrix model-F16.gguf --text wiki.txt --text code.txt -o model.imatrix.gguf
    """
    began = time.monotonic()
    header = read_header(model)
    target = checked_destination(output, header, force)
    with interruptible("nothing was written"):
        with fraction_bar(model.name) as on_progress:
            made = calibrate(
                header, text or (), chunk_size=ctx, chunks=chunks, threads=threads, output_tensor=output_tensor,
                on_progress=on_progress,
            )  # fmt: skip
        write_imatrix(target, made.imatrix)
    _show(made, output, time.monotonic() - began, json=json)


def _show(made: Calibration, output: Path, seconds: float, *, json: bool) -> None:
    for note in made.notes:
        notes.print(Text(note, "yellow"), soft_wrap=True)
    result = ImatrixResult(
        path=str(output),
        chunks=made.imatrix.chunk_count,
        tokens=made.tokens,
        tensors=len(made.imatrix.entries),
        unreached=unreached(made.imatrix),
        seconds=round(seconds, 3),
    )
    typer.echo(msgspec.json.encode(result) if json else _summary(result))


def _summary(result: ImatrixResult) -> str:
    return (
        f"{result.path}: {result.tensors} weights, {result.tokens:,} tokens in {result.chunks} chunks, "
        f"{result.seconds:.1f} s"
    )
