"""`homeinfer quantize`: a GGUF made smaller by a recipe, or to a size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import typer

from homeinfer.cli.bars import fraction_bar, stage_bar, tensor_bar
from homeinfer.cli.option_groups import with_options
from homeinfer.cli.quantize_options import (
    DestinationArgument,
    ListOption,
    QuantizeOptions,
    SourceArgument,
    budget_for,
    check_usage,
    default_destination,
    megabytes,
    planned_note,
)
from homeinfer.cli.shared_options import JsonOption, interruptible
from homeinfer.model.header import read_header
from homeinfer.quant.dry_run import DryRun, refuse_early
from homeinfer.quant.dry_run import dry_run as dry_run_of
from homeinfer.quant.importance import gather_importance, read_importance, stand_in_importance
from homeinfer.quant.quantize import QuantizeResult
from homeinfer.quant.quantize import quantize as quantize_file
from homeinfer.quant.tensor_rules import TensorRule, parse_tensor_rule


@with_options
def quantize(
    source: SourceArgument,
    destination: DestinationArgument = None,
    *,
    options: QuantizeOptions,
    json: JsonOption = False,
    _list: ListOption = False,
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
    label = check_usage(options)
    target = destination or default_destination(source, label)
    rules = [parse_tensor_rule(rule) for rule in options.tensor or ()]
    before = _stamp(target)
    with interruptible(lambda: "nothing was written" if _stamp(target) == before else f"{target} is complete"):
        if options.dry_run:
            _show_found(_dry_run(source, options, rules), json)
            return
        way = _to_recipe if options.recipe is not None else _to_budget
        result = way(source, target, options, rules)
    _show_notes(result.notes)
    typer.echo(msgspec.json.encode(result) if json else _summary(result))


def _stamp(path: Path) -> tuple[int, int] | None:
    """Of a file as it is now, so that one can tell whether another has taken its place."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_ino, seen.st_mtime_ns


def _to_recipe(source: Path, target: Path, options: QuantizeOptions, rules: Sequence[TensorRule]) -> QuantizeResult:
    recipe, importance = options.recipe or "", None
    if options.imatrix is not None:
        importance = read_importance(options.imatrix, read_header(source))
    elif options.texts:
        header = refuse_early(
            source, target, recipe, tensor_rules=rules, texts=options.texts, requantize=options.requantize,
            force=options.force,
        )  # fmt: skip
        with fraction_bar(f"reading {options.texts[0].name}") as on_fraction:
            importance = gather_importance(header, options.texts, threads=options.threads, on_progress=on_fraction)
    with tensor_bar(target.name) as on_progress:
        return quantize_file(
            source, target, recipe, tensor_rules=rules, importance=importance, requantize=options.requantize,
            force=options.force, threads=options.threads, on_progress=on_progress,
        )  # fmt: skip


def _to_budget(source: Path, target: Path, options: QuantizeOptions, rules: Sequence[TensorRule]) -> QuantizeResult:
    from homeinfer.quant.dynamic import quantize_to_budget

    header = read_header(source)
    budget = budget_for(header, options)
    with stage_bar() as on_progress:
        result = quantize_to_budget(
            header, target, budget.limit_bytes, imatrix=options.imatrix, text=options.texts,
            tensor_overrides=tuple(rules), requantize=options.requantize, force=options.force, threads=options.threads,
            report=options.report, asked=options.asked(), on_progress=on_progress,
        )  # fmt: skip
    note = planned_note(header, target, options.fit, options.tpot) if options.fit else None
    return result if note is None else msgspec.structs.replace(result, notes=(*result.notes, note))


def _dry_run(source: Path, options: QuantizeOptions, rules: Sequence[TensorRule]) -> DryRun:
    if options.recipe is None:
        from homeinfer.quant.budget_dry_run import budget_dry_run

        header = read_header(source, allow_truncated=True)
        return budget_dry_run(header, budget_for(header, options).limit_bytes, rules)
    importance = None
    if options.imatrix is not None:
        importance = read_importance(options.imatrix, read_header(source, allow_truncated=True))
    elif options.texts:
        importance = stand_in_importance(options.texts)
    return dry_run_of(source, options.recipe, tensor_rules=rules, importance=importance)


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
