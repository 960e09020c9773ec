"""`homeinfer model`: what a GGUF file holds and what each of its layers weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from homeinfer.cli.ui import console
from homeinfer.model.header import printable, read_header
from homeinfer.model.layers import LayerRun, ModelSummary, Weight, fold_layers, summarize


def model(
    file: Annotated[Path, typer.Argument(help="A GGUF file, or any part of a split one.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, every tensor in it.")] = False,
) -> None:
    """Show what a model file holds: its architecture, and bytes, types and bits per weight by layer.

    The header is enough: a file whose tensor data is cut off is shown too, and said to be cut short.

    Example: homeinfer model SmolLM2-135M-Instruct.Q4_1.gguf
    """
    summary = summarize(read_header(file, allow_truncated=True))
    if json:
        typer.echo(msgspec.json.encode(summary))
        return
    console.print(_heading(summary))
    console.print(_table(summary))


def _heading(summary: ModelSummary) -> Text:
    title = summary.name or printable(Path(summary.files[0].path).name)
    text = Text.assemble((title, "bold"), f" · {printable(summary.architecture)}")
    facts = (
        ("layers", summary.n_layer),
        ("hidden", summary.n_embd),
        ("context", summary.n_ctx_train),
        ("vocabulary", summary.n_vocab),
    )
    text.append("".join(f" · {value:,} {what}" for what, value in facts if value))
    text.append(f"\n{_weights(summary.n_weights)} weights")
    if summary.active_weights != summary.n_weights:
        experts = f"{summary.n_expert_used} of {summary.n_expert} experts"
        text.append(f", {_weights(summary.active_weights)} used by a token ({experts})")
    text.append(f" · {decimal(summary.nbytes, precision=2)} · {summary.bpw:.2f} bpw")
    if len(summary.files) > 1:
        text.append(f" · {len(summary.files)} files")
    if summary.truncated:
        text.append(f"\n{_cut_short(summary)}", "yellow")
    return text


def _cut_short(summary: ModelSummary) -> str:
    size = sum(file.size for file in summary.files)
    whole = sum(file.whole_size for file in summary.files)
    return (
        f"cut short: {decimal(size, precision=2)} of {decimal(whole, precision=2)} are here; "
        "it can be planned with, not run"
    )


def _table(summary: ModelSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layers")
    for heading in ("each", "together", "bpw"):
        table.add_column(heading, justify="right")
    if summary.expert_nbytes:
        table.add_column("experts", justify="right")
    table.add_column("types")
    _add_row(table, summary, "embedding", summary.embedding)
    for run in fold_layers(summary.layers):
        _add_row(table, summary, _range(run), run.layer, run.last - run.first)
    _add_row(table, summary, "output, tied" if summary.tied else "output", summary.output)
    _add_row(table, summary, "other", summary.other)
    return table


def _add_row(table: Table, summary: ModelSummary, label: str, weight: Weight, count: int = 1) -> None:
    if not weight.tensors:
        return
    each = decimal(weight.nbytes, precision=2) if count > 1 else ""
    cells = [label, each, decimal(weight.nbytes * count, precision=2), f"{weight.bpw:.2f}"]
    if summary.expert_nbytes:
        cells.append(f"{weight.expert_nbytes / weight.nbytes:.0%}" if weight.expert_nbytes else "")
    table.add_row(*cells, _types(weight))


def _range(run: LayerRun) -> str:
    return str(run.first) if run.last == run.first + 1 else f"{run.first}–{run.last - 1}"


def _types(weight: Weight) -> str:
    """Shares of the bytes, without those that round to nothing (norms in F32)."""
    shares = {name: nbytes / weight.nbytes for name, nbytes in weight.types.items()}
    shown = [name for name, share in shares.items() if share >= 0.005]
    return shown[0] if len(shown) == 1 else "  ".join(f"{name} {shares[name]:.0%}" for name in shown)


def _weights(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
