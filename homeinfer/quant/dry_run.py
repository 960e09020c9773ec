"""What quantizing would give, from a model's header alone: types, bytes, bits per weight."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.quant.checks import (
    all_notes,
    checked_destination,
    path_name,
    refuse_requantizing,
    require_space,
    size_text,
)
from homeinfer.quant.importance import Importance, refuse_missing, stand_in_importance
from homeinfer.quant.output_header import added_metadata, file_bytes
from homeinfer.quant.quantize import resolved_recipe
from homeinfer.quant.quantizer_messages import Planned
from homeinfer.quant.quantizer_process import Quantizer, quantize_request
from homeinfer.quant.recipes import PlannedTensor, Recipe, is_complete, plan
from homeinfer.quant.tensor_rules import TensorRule


class DryRun(msgspec.Struct, frozen=True):
    """What `homeinfer quantize --dry-run --json` prints. size_bytes is the whole file's, bytes of a tensor are
    without padding, bpw is of the tensors."""

    recipe: str
    size_bytes: int
    bpw: float
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]


def dry_run(
    source: str | os.PathLike[str],
    recipe: str | Recipe,
    *,
    tensor_rules: Sequence[TensorRule] = (),
    importance: Importance | None = None,
) -> DryRun:
    """What `quantize` would write. The source may end after its header.

    What the recipe leaves open llama.cpp decides, in its own dry run. Raises HomeinferError.
    """
    header = read_header(source, allow_truncated=True)
    made = resolved_recipe(header, recipe, tensor_rules)
    planned = Planned((), (), False)
    types = made.overrides
    if not is_complete(made, header):
        planned = _asked(header, made, importance)
        types = planned.types
    tensors = plan(header, types)
    return DryRun(
        recipe=made.name,
        size_bytes=file_bytes(header, tensors, added_metadata(header, made, importance)),
        bpw=round(8 * sum(tensor.bytes for tensor in tensors) / max(header.n_weights, 1), 4),
        tensors=tensors,
        notes=(
            *all_notes(header, tensors, made, planned, importance),
            *_imatrix_note(header, types, made, importance),
        ),
    )


def refuse_early(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: str,
    *,
    tensor_rules: Sequence[TensorRule],
    texts: Sequence[Path],
    requantize: bool,
    force: bool,
) -> Header:
    """Raise HomeinferError for whatever `quantize` would refuse, before an imatrix is gathered from texts for it,
    which takes long; returns the source's header."""
    header = read_header(source)
    target = checked_destination(Path(destination), header, force)
    made = resolved_recipe(header, recipe, tensor_rules)
    planned = dry_run(source, made, importance=stand_in_importance(texts))
    if not requantize and not made.copy:
        refuse_requantizing(header, planned.tensors, made)
    require_space(target, planned.size_bytes)
    return header


def _asked(header: Header, recipe: Recipe, importance: Importance | None) -> Planned:
    """llama.cpp's dry run. It plans other types without an imatrix than with one, so where it needs one and there
    is none it is asked again with an empty one."""
    name = path_name(Path(header.files[0].path))
    with _whole_source(header) as source:
        request = quantize_request(header, recipe, source=source, importance=importance, threads=1)
        with Quantizer() as quantizer:
            planned = quantizer.plan(request, name, importance)
        if not planned.needs_imatrix:
            return planned
        with Quantizer() as quantizer:
            stand_in = stand_in_importance()
            request = quantize_request(header, recipe, source=source, importance=stand_in, threads=1)
            return msgspec.structs.replace(quantizer.plan(request, name, stand_in), needs_imatrix=True)


def _imatrix_note(
    header: Header, types: Sequence[tuple[str, str]], recipe: Recipe, importance: Importance | None
) -> tuple[str, ...]:
    changed = [(name, kind) for name, kind in types if header.by_name[name].type != kind]
    try:
        refuse_missing(importance, changed, recipe.ftype, f"recipe {recipe.name}")
    except HomeinferError as error:
        if importance is not None:
            raise
        return (str(error),)
    return ()


@contextlib.contextmanager
def _whole_source(header: Header) -> Iterator[str]:
    """A path that llama.cpp opens, which wants files of their full length: the source's own, or, where that ends
    early, files of its headers and holes, which take no room."""
    if not header.truncated:
        yield header.files[0].path
        return
    with tempfile.TemporaryDirectory(prefix="homeinfer-") as folder:
        for file in header.files:
            whole = file.data_offset + file.data_bytes
            try:
                with Path(file.path).open("rb") as source, Path(folder, Path(file.path).name).open("wb") as copy:
                    copy.write(source.read(file.data_offset))
                    copy.truncate(whole)
            except OSError as error:
                raise HomeinferError(
                    f"{folder}: a hole of {size_text(whole)}, for llama.cpp to plan on, can't be made there: "
                    f"{error.strerror}; set TMPDIR to a folder on another disk"
                ) from None
        yield str(Path(folder, Path(header.files[0].path).name))
