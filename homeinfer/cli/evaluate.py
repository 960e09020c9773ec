"""`homeinfer evaluate`: how close a model stays to another on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.filesize import decimal

from homeinfer.cli.bars import fraction_bar
from homeinfer.cli.shared_options import JsonOption, interruptible
from homeinfer.errors import HomeinferError
from homeinfer.quant import evaluate as evaluation
from homeinfer.quant.evaluate import FEWEST_TOKENS, Evaluation
from homeinfer.quant.logits_file import is_logits_file


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The model to measure: a GGUF file, or any part of a split one.")
    ],
    reference: Annotated[
        Path, typer.Option(metavar="REF", help="What it is compared with: a GGUF file, or logits kept of one.")
    ],
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text to measure on, UTF-8.")],
    ctx: Annotated[int, typer.Option(min=FEWEST_TOKENS, help="Tokens in a chunk.")] = 512,
    chunks: Annotated[int | None, typer.Option(min=1, help="Only so many chunks of the text.")] = None,
    keep_logits: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the reference's logits there first, to be given as --reference later."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores unless given.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure how close a model stays to a reference: perplexity of both, and the divergence between them.

    The convention is llama-perplexity's: the second half of each chunk counts, divergence (KLD) is in nats.

    Example: homeinfer evaluate small.gguf --reference model-F16.gguf --text wiki.txt

    Example: homeinfer evaluate small.gguf --reference model-F16.gguf --text wiki.txt --keep-logits wiki.logits

    Example: homeinfer evaluate smaller.gguf --reference wiki.logits --text wiki.txt
    """
    said = evaluation.read_text(text)
    with interruptible():
        if keep_logits is not None:
            if is_logits_file(reference):
                raise HomeinferError(f"{reference}: these are kept logits already; leave --keep-logits out")
            evaluation.checked_model(model, ctx)
            with fraction_bar(reference.name) as on_progress:
                evaluation.keep_logits(
                    reference, said, keep_logits, n_ctx=ctx, chunks=chunks, threads=threads, on_progress=on_progress
                )
            reference = keep_logits
        with fraction_bar(model.name) as on_progress:
            result = evaluation.evaluate(
                model, reference, said, n_ctx=ctx, chunks=chunks, threads=threads, on_progress=on_progress
            )
    typer.echo(msgspec.json.encode(result) if json else _report(result))


def _report(result: Evaluation) -> str:
    lines = (
        ("size", f"{decimal(result.size_bytes, precision=2)}, {result.bpw:.3f} bits per weight"),
        ("perplexity", f"{result.ppl:.4f}, reference {result.ppl_reference:.4f}"),
        ("mean KLD", f"{result.mean_kld:.6f} ± {result.mean_kld_stderr:.6f}"),
        ("median KLD", f"{result.kld_median:.6f}"),
        ("99 % KLD", f"{result.kld_p99:.6f}"),
        ("same top token", f"{result.same_top:.2%}"),
        ("measured on", f"{result.tokens:,} tokens in {result.chunks:,} chunks of {result.n_ctx:,}"),
    )
    return "\n".join(f"{what:<16}{value}" for what, value in lines)
