"""`homeinfer quantize`: a GGUF made smaller by a recipe, or to a size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from homeinfer.cli.bars import fraction_bar, stage_bar, tensor_bar
from homeinfer.cli.quantize_options import (
    BpwOption,
    DestinationArgument,
    DryRunOption,
    FitOption,
    ForceOption,
    ImatrixOption,
    RecipeOption,
    ReportOption,
    RequantizeOption,
    SizeOption,
    SourceArgument,
    TensorOption,
    TextOption,
    ThreadsOption,
    TpotOption,
    budget_for,
    default_destination,
    megabytes,
    planned_note,
    require_agreeing,
    require_one_way,
)
from homeinfer.cli.shared_options import JsonOption
from homeinfer.model.header import Header, read_header
from homeinfer.quant.budget import Budget, check_budget
from homeinfer.quant.dry_run import DryRun, refuse_early
from homeinfer.quant.dry_run import dry_run as dry_run_of
from homeinfer.quant.importance import gather_importance, read_importance, stand_in_importance
from homeinfer.quant.quantize import QuantizeResult
from homeinfer.quant.quantize import quantize as quantize_file
from homeinfer.quant.recipes import RECIPES
from homeinfer.quant.tensor_rules import TensorRule, parse_tensor_rule

_INTERRUPTED = 130


def _list_recipes(wanted: bool) -> None:
    if not wanted:
        return
    from homeinfer.cli import quantize_tables

    quantize_tables.show_recipes(RECIPES.values())
    raise typer.Exit


def quantize(
    source: SourceArgument,
    destination: DestinationArgument = None,
    recipe: RecipeOption = None,
    bpw: BpwOption = None,
    size: SizeOption = None,
    fit: FitOption = None,
    tpot: TpotOption = None,
    imatrix: ImatrixOption = None,
    text: TextOption = None,
    tensor: TensorOption = None,
    dry_run: DryRunOption = False,
    report: ReportOption = None,
    requantize: RequantizeOption = False,
    force: ForceOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    _list: Annotated[
        bool,
        typer.Option("--list-recipes", callback=_list_recipes, is_eager=True, help="Show all recipes and exit."),
    ] = False,
) -> None:
    """Make a model smaller: write SRC to DST with fewer bits per weight.

    Say how small in one of three ways: a recipe, a budget in bits or bytes, or the machines that are to run it.
    Without a recipe the bits go where measuring the model shows that they matter most.

    Example, a recipe: homeinfer quantize model-F16.gguf --recipe DQ3_K_M

    Example, a budget: homeinfer quantize model-F16.gguf small.gguf --bpw 3.5 (or --size 40GB)

    Example, a cluster: homeinfer quantize model-F16.gguf small.gguf --fit desk.json --fit laptop.json

    Example, a cluster that is to answer with five tokens per second: the same with --tpot 200

    A recipe file is TOML: name, and base (a recipe) or default (a type), then \\[\\[rule]] tables with a type and any
    of role = "ffn_down", layers = "0-3, -1", depth = \\[0.0, 0.25], tensor = "REGEX"; the first that matches decides.

    The result runs in any llama.cpp. SRC stays as it is; DST appears when it is complete.
    """
    label = require_one_way(recipe, bpw, size, fit, tpot)
    require_agreeing(recipe, report, imatrix, text)
    rules = [parse_tensor_rule(rule) for rule in tensor or ()]
    target = destination or default_destination(source, label)
    try:
        if dry_run and recipe is not None:
            _show_dry_run(source, recipe, rules, imatrix, text or (), json)
            return
        if recipe is not None:
            result = _to_recipe(source, target, recipe, rules, imatrix, text or (), requantize, force, threads)
        else:
            header = read_header(source, allow_truncated=dry_run)
            budget = budget_for(header, bpw, size, fit, tpot)
            asked = _asked(bpw, size, fit, tpot)
            check_budget(header, budget)
            if dry_run:
                from homeinfer.quant.budget_dry_run import budget_dry_run

                _show_found(budget_dry_run(header, budget.limit_bytes, rules), json)
                return
            result = _to_budget(
                header, target, budget, asked, rules, imatrix, text or (), report, requantize, force, threads
            )
            note = planned_note(header, target, fit, tpot) if fit else None
            if note is not None:
                result = msgspec.structs.replace(result, notes=(*result.notes, note))
    except KeyboardInterrupt:
        typer.echo("homeinfer: interrupted: nothing was written", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    _show_notes(result.notes)
    typer.echo(msgspec.json.encode(result) if json else _summary(result))


def _asked(bpw: float | None, size: str | None, fit: Sequence[Path] | None, tpot: float | None) -> str:
    """The way that was taken, as it was written."""
    if fit:
        return f"--fit {' '.join(map(str, fit))}{'' if tpot is None else f' --tpot {tpot:g}'}"
    return f"--bpw {bpw:g}" if bpw is not None else f"--size {size}"


def _to_recipe(
    source: Path,
    target: Path,
    recipe: str,
    rules: Sequence[TensorRule],
    imatrix: Path | None,
    texts: Sequence[Path],
    requantize: bool,
    force: bool,
    threads: int | None,
) -> QuantizeResult:
    importance = None
    if imatrix is not None:
        importance = read_importance(imatrix, read_header(source))
    elif texts:
        header = refuse_early(
            source, target, recipe, tensor_rules=rules, texts=texts, requantize=requantize, force=force
        )  # fmt: skip
        with fraction_bar(f"reading {texts[0].name}") as on_fraction:
            importance = gather_importance(header, texts, threads=threads, on_progress=on_fraction)
    with tensor_bar(target.name) as on_progress:
        return quantize_file(
            source, target, recipe, tensor_rules=rules, importance=importance, requantize=requantize, force=force,
            threads=threads, on_progress=on_progress,
        )  # fmt: skip


def _to_budget(
    header: Header,
    target: Path,
    budget: Budget,
    asked: str,
    rules: Sequence[TensorRule],
    imatrix: Path | None,
    texts: Sequence[Path],
    report: Path | None,
    requantize: bool,
    force: bool,
    threads: int | None,
) -> QuantizeResult:
    from homeinfer.quant.dynamic import quantize_to_budget

    with stage_bar() as on_progress:
        return quantize_to_budget(
            header, target, budget.limit_bytes, imatrix=imatrix, text=tuple(texts), tensor_overrides=tuple(rules),
            requantize=requantize, force=force, threads=threads, report=report, asked=asked, on_progress=on_progress,
        )  # fmt: skip


def _show_dry_run(
    source: Path, recipe: str, rules: Sequence[TensorRule], imatrix: Path | None, texts: Sequence[Path], json: bool
) -> None:
    importance = None
    if imatrix is not None:
        importance = read_importance(imatrix, read_header(source, allow_truncated=True))
    elif texts:
        importance = stand_in_importance(texts)
    _show_found(dry_run_of(source, recipe, tensor_rules=rules, importance=importance), json)


def _show_found(found: DryRun, json: bool) -> None:
    _show_notes(found.notes)
    if json:
        typer.echo(msgspec.json.encode(found))
        return
    from homeinfer.cli import quantize_tables

    quantize_tables.show_types(found)


def _show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        typer.secho(note, fg="yellow", err=True)


def _summary(result: QuantizeResult) -> str:
    line = (
        f"{result.path}: {result.recipe}, {megabytes(result.size_bytes)}, {result.bpw:.2f} bpw, {result.seconds:.1f} s"
    )
    mean_kld, same_top = getattr(result, "mean_kld", None), getattr(result, "same_top", None)
    if mean_kld is None or same_top is None:
        return line
    return f"{line}, mean KLD {mean_kld:.4f} from the source, the same top token at {100 * same_top:.1f} %"
