"""What `homeinfer quantize` shows as tables: its recipes, and a dry run."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from homeinfer.cli.quantize_options import megabytes
from homeinfer.quant.dry_run import DryRun
from homeinfer.quant.recipes import RecipeInfo
from homeinfer.quant.tensor_types import role_of


def show_recipes(recipes: Iterable[RecipeInfo]) -> None:
    """Every recipe by name."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("recipe", "bpw of Llama 3 8B", "imatrix", "what it is"):
        table.add_column(heading, justify="right" if heading.startswith("bpw") else "left")
    for info in recipes:
        table.add_row(info.name, f"{info.bpw:.2f}", "needed" if info.needs_imatrix else "", info.about)
    Console().print(table)


def show_types(found: DryRun) -> None:
    """Tensors and bytes by role and type, in the file's order, and the whole in the last line."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("role", "type", "tensors", "size"):
        table.add_column(heading, justify="right" if heading in ("tensors", "size") else "left")
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for tensor in found.tensors:
        key = (role_of(tensor.name), tensor.type)
        count, nbytes = rows.get(key, (0, 0))
        rows[key] = (count + 1, nbytes + tensor.bytes)
    first = {role: index for index, (role, _) in reversed(list(enumerate(rows)))}
    for role, kind in sorted(rows, key=lambda key: first[key[0]]):
        count, nbytes = rows[role, kind]
        table.add_row(role, kind, str(count), megabytes(nbytes))
    console = Console()
    console.print(table)
    size = f"{megabytes(found.size_bytes)} ({found.size_bytes:,} bytes, {found.size_bytes / 2**30:.2f} GiB)"
    console.print(f"{found.recipe}: {size}, {found.bpw:.2f} bpw", markup=False, highlight=False, soft_wrap=True)
