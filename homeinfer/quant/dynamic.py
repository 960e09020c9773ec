"""The file that stays closest to the original at a given size: measure, allocate, round, check.

1. Inputs of every weight are observed while the model reads a text (moments.py).
2. Each tensor is rounded, on a sample of rows, to each type that it may get (error_tables.py).
3. What an error costs at the output is measured per role and depth (sensitivity.py).
4. A knapsack picks one type per tensor (allocate.py).
5. Weights are rounded with the inputs' second moments (rounding.py), and the KLD of the result is measured.

What 1 to 3 find is kept by the digest of model and text, so another size takes only 4 and 5.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, TensorInfo
from homeinfer.quant.allocate import Allocation, Item, allocate
from homeinfer.quant.calibrate import study_chunks
from homeinfer.quant.candidates import bpw_left, candidate_types, free_tensors, item_of, narrow_note, require_reachable
from homeinfer.quant.checks import checked_destination, path_name, refuse_requantizing, requantized_types, require_space
from homeinfer.quant.dynamic_metadata import dynamic_metadata
from homeinfer.quant.early_sync import cannot_be_written
from homeinfer.quant.error_tables import make_folder
from homeinfer.quant.evaluate import Evaluation, evaluate
from homeinfer.quant.importance import read_importance
from homeinfer.quant.inputs import FromImatrix, FromMoments, Known
from homeinfer.quant.kept import in_use, kept_folder, model_digest, prune, tokens_digest
from homeinfer.quant.moments import gather_moments
from homeinfer.quant.observe import Ints, observable
from homeinfer.quant.quantize import QuantizeResult
from homeinfer.quant.quantizer_process import usable_cores
from homeinfer.quant.recipes import PlannedTensor, Recipe, plan
from homeinfer.quant.rounded_file import write_rounded
from homeinfer.quant.source_weights import SourceWeights
from homeinfer.quant.study import OnStage, Study, measure_or_assume, measure_tables, refuse_broken
from homeinfer.quant.tensor_file import header_size
from homeinfer.quant.tensor_rules import TensorRule, with_tensor_rules
from homeinfer.quant.texts import DEFAULT_NAME, held_out_text

CALIBRATION_CHUNKS = 60
"""Of 512 tokens: more change little, and each costs half a second on two cores for a model of 135M."""
EVALUATION_CHUNKS = 6
_FTYPE_Q8_0 = 7


class DynamicResult(QuantizeResult, frozen=True):
    """What was written, and how close it is: mean KLD in nats, predicted, and measured on `measured_on`."""

    limit_bytes: int
    predicted_kld: float
    mean_kld: float | None
    mean_kld_stderr: float | None
    same_top: float | None
    measured_on: str | None


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Everything that the report tells of a finished choice."""

    header: Header
    study: Study
    items: tuple[Item, ...]
    allocation: Allocation
    fixed: dict[str, str]
    overhead: int
    limit_bytes: int
    calibration: str
    notes: tuple[str, ...]


def quantize_to_budget(
    header: Header,
    destination: Path,
    limit_bytes: int,
    *,
    imatrix: Path | None = None,
    text: Sequence[Path] = (),
    tensor_overrides: Sequence[TensorRule] = (),
    requantize: bool = False,
    force: bool = False,
    threads: int | None = None,
    report: Path | None = None,
    asked: str = "",
    on_progress: OnStage = lambda _stage, _fraction: None,
) -> DynamicResult:
    """Write the model with at most limit_bytes, as close to the source as can be.

    text: what the model reads to be measured (a default one without); an imatrix instead gives only how much each
    channel counts. Raises HomeinferError for whatever is wrong; KeyboardInterrupt passes through: nothing is left, or,
    while the report is made, the whole file.
    """
    began, cores = time.monotonic(), threads or usable_cores()
    target = checked_destination(Path(destination), header, force)
    partial = target.with_name(f".homeinfer-{secrets.token_hex(4)}.partial")
    if report is not None:
        _checked_report(report, header, target)
    rules = with_tensor_rules(Recipe("dynamic", _FTYPE_Q8_0, (), ()), header, tensor_overrides)
    _refuse_quantized(header, dict(rules.overrides), requantize)
    require_space(target, limit_bytes)
    with contextlib.ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        chosen = _choose(stack, header, partial, limit_bytes, rules, imatrix, text, cores, on_progress)
        try:
            written = _write(chosen, partial, dict(rules.metadata), cores, on_progress)
            partial.replace(target)
        except OSError as error:
            raise cannot_be_written(path_name(target), error) from None
    result = _result(os.fspath(destination), chosen, written, time.monotonic() - began)
    if report is not None:
        from homeinfer.quant.dynamic_report import make_report

        make_report(report, chosen, result, written.measured, asked, cores, on_progress)
    return result


@dataclasses.dataclass(frozen=True)
class _Written:
    """A file that is complete. measured: its KLD on `measured_on`, None with the `problem` why it isn't known."""

    tensors: tuple[PlannedTensor, ...]
    size: int
    measured: Evaluation | None
    measured_on: str
    problem: tuple[str, ...]


def _write(chosen: Chosen, partial: Path, metadata: dict[str, str], threads: int, on_progress: OnStage) -> _Written:
    """Round the weights to their types. Raises OSError where the file can't be written."""
    header, limit = chosen.header, chosen.limit_bytes
    types = {name: option.type for name, option in chosen.allocation.choices.items()} | chosen.fixed
    added = dynamic_metadata(header, types, metadata, limit, chosen.allocation)
    write_rounded(partial, header, types, chosen.study.known, added, threads, lambda at: on_progress("rounding", at))
    size = partial.stat().st_size
    if size > limit:
        raise AssertionError(f"{size} bytes were written for a limit of {limit}")
    return _Written(plan(header, types.items()), size, *_measured(header, partial, threads, on_progress))


def _result(path: str, chosen: Chosen, written: _Written, seconds: float) -> DynamicResult:
    measured = written.measured
    return DynamicResult(
        path=path,
        recipe="dynamic",
        size_bytes=written.size,
        bpw=round(8 * sum(tensor.bytes for tensor in written.tensors) / chosen.header.n_weights, 4),
        seconds=round(seconds, 3),
        notes=(*chosen.notes, *_requantized_note(chosen.header, written.tensors), *written.problem),
        limit_bytes=chosen.limit_bytes,
        predicted_kld=round(chosen.allocation.kld, 6),
        mean_kld=measured.mean_kld if measured else None,
        mean_kld_stderr=measured.mean_kld_stderr if measured else None,
        same_top=measured.same_top if measured else None,
        measured_on=written.measured_on if measured else None,
    )


def _choose(
    stack: contextlib.ExitStack,
    header: Header,
    partial: Path,
    limit_bytes: int,
    rules: Recipe,
    imatrix: Path | None,
    text: Sequence[Path],
    threads: int,
    on_progress: OnStage,
) -> Chosen:
    fixed = dict(rules.overrides)
    free = free_tensors(header, fixed)
    kept = sum(-(-tensor.bytes // 32) * 32 for tensor in plan(header, fixed.items()) if tensor.name not in _names(free))
    overhead = _header_bytes(header, partial, rules) + kept
    require_reachable(free, limit_bytes, overhead)
    bpw = bpw_left(free, limit_bytes - overhead)
    studied = _studied(header, free, bpw, imatrix, text, threads, on_progress)
    study, calibration, notes = stack.enter_context(studied)
    items = tuple(
        item_of(
            tensor,
            candidate_types(tensor.shape[0], bpw, study.known.method(tensor.name) != "plain"),
            study.errors.of,
            study.sensitivity.per_tensor[tensor.name],
        )
        for tensor in free
    )
    on_progress("choosing types", 0.0)
    allocation = allocate(items, limit_bytes - overhead)
    return Chosen(
        header,
        study,
        items,
        allocation,
        fixed,
        overhead,
        limit_bytes,
        calibration,
        (*rules.notes, *narrow_note(header, free), *notes),
    )


@contextlib.contextmanager
def _studied(
    header: Header,
    free: Sequence[TensorInfo],
    bpw: float,
    imatrix: Path | None,
    text: Sequence[Path],
    threads: int,
    on_progress: OnStage,
) -> Iterator[tuple[Study, str, tuple[str, ...]]]:
    """Measure what isn't kept; gives the study, what was read, and notes. What is kept stays while it is used."""
    digest = model_digest(header, lambda at: on_progress("reading the model", at))
    with in_use(kept_folder() / digest) as folder:
        try:
            known, chunks, folder, calibration, notes = _inputs(
                header, free_tensors(header, {}), digest, folder, imatrix, text, threads, on_progress
            )
        except HomeinferError as problem:
            # what a NaN does is seen later in the model: name the tensor that has it
            if "finite" in str(problem) or "no numbers" in str(problem):
                refuse_broken(header)
            raise
        types = {
            tensor.name: candidate_types(tensor.shape[0], bpw, known.method(tensor.name) != "plain") for tensor in free
        }
        with SourceWeights(header) as weights:
            errors = measure_tables(
                weights, known, types, free, folder, threads, lambda at: on_progress("errors of each type", at)
            )
            sensitivity, more = measure_or_assume(
                header, weights, known, free, chunks, folder, threads, lambda at: on_progress("what matters", at)
            )
        yield Study(known, errors, sensitivity), calibration, (*notes, *more)
    prune(kept_folder())


def _inputs(
    header: Header,
    free: Sequence[TensorInfo],
    digest: str,
    folder: Path,
    imatrix: Path | None,
    text: Sequence[Path],
    threads: int,
    on_progress: OnStage,
) -> tuple[Known, list[Ints], Path, str, tuple[str, ...]]:
    """What is known of the weights' inputs; the chunks that were read, where what follows is kept, its name, notes."""
    if imatrix is not None:
        importance = read_importance(imatrix, header)
        folder = folder / f"imatrix-{_file_digest(imatrix)}"
        make_folder(folder)
        return FromImatrix(importance.values), [], folder, f"the imatrix {imatrix.name}", importance.notes
    chunks = study_chunks(
        header, text, chunks=CALIBRATION_CHUNKS, threads=threads, folder=folder,
        on_progress=lambda at: on_progress("letting it talk", at),
    )  # fmt: skip
    folder = folder / tokens_digest(chunks)
    wanted = _names(free)
    seen = [name for name in observable(header, output_tensor=True) if name in wanted]
    moments = gather_moments(
        header, chunks, seen, folder, threads=threads, model=digest,
        on_progress=lambda at: on_progress("calibrating", at),
    )  # fmt: skip
    return FromMoments(moments), chunks, folder, ", ".join(path.name for path in text) or DEFAULT_NAME, ()


def _names(tensors: Sequence[TensorInfo]) -> frozenset[str]:
    return frozenset(tensor.name for tensor in tensors)


def _file_digest(path: Path) -> str:
    import hashlib

    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()


def _refuse_quantized(header: Header, fixed: dict[str, str], requantize: bool) -> None:
    """Weights that are quantized already are taken only with --requantize."""
    if not requantize:
        # any other type than a tensor has: what counts is that it will change
        free = {t.name: "Q4_0" if t.type != "Q4_0" else "Q4_1" for t in free_tensors(header, fixed)}
        refuse_requantizing(header, plan(header, {**free, **fixed}.items()), Recipe("dynamic", _FTYPE_Q8_0, (), ()))


def _requantized_note(header: Header, tensors: tuple[PlannedTensor, ...]) -> tuple[str, ...]:
    lossy = requantized_types(header, tensors)
    if not lossy:
        return ()
    counts = ", ".join(f"{count} {old}" for old, count in lossy.items())
    return (f"warning: quantized twice ({counts} before): the F16 or BF16 original gives a better model",)


def _checked_report(report: Path, header: Header, target: Path) -> None:
    """Raise HomeinferError, before anything is measured, where a report can't be written or would replace a model."""
    if checked_destination(report, header, force=True) == target:
        raise HomeinferError(f"{path_name(report)}: the report and the model can't be one file; name another one")


def _header_bytes(header: Header, partial: Path, rules: Recipe) -> int:
    added = dynamic_metadata(header, {}, dict(rules.metadata))
    try:
        return header_size(partial, header, plan(header, ()), added)
    except OSError as error:
        raise cannot_be_written(path_name(partial.parent), error) from None


def _measured(
    header: Header, made: Path, threads: int, on_progress: OnStage
) -> tuple[Evaluation | None, str, tuple[str, ...]]:
    """KLD of what was made, on text that calibration did not read."""
    name = ""
    try:
        words, name = held_out_text()
        found = evaluate(
            made, header.files[0].path, words, chunks=EVALUATION_CHUNKS, threads=threads,
            on_progress=lambda at: on_progress("measuring the result", at),
        )  # fmt: skip
    except HomeinferError as problem:
        return None, name, (f"the result's KLD could not be measured: {problem}",)
    return found, name, ()
