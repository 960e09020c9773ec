"""One GGUF in, a smaller one out: checks first, then llama.cpp's quantizer in a process of its own.

The output is written under a temporary name beside the destination and renamed when it is complete,
so a failure at any moment leaves the source and the destination as they were, and nothing else.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.quant.checks import (
    all_notes,
    checked_destination,
    checked_plan,
    path_name,
    refuse_requantizing,
    require_space,
)
from homeinfer.quant.early_sync import EarlySync, cannot_be_written
from homeinfer.quant.importance import Importance, imatrix_needed
from homeinfer.quant.output_header import added_metadata, file_bytes
from homeinfer.quant.quantizer_messages import Planned, Started
from homeinfer.quant.quantizer_process import Quantizer, not_written, quantize_request
from homeinfer.quant.recipe_file import named_recipe
from homeinfer.quant.recipes import PlannedTensor, Recipe
from homeinfer.quant.tensor_rules import TensorRule, with_tensor_rules


class Progress(msgspec.Struct, frozen=True):
    """Tensor number `index` of `count`, from 1, is next; the `fraction` of all weights is done."""

    index: int
    count: int
    tensor: str
    fraction: float


class QuantizeResult(msgspec.Struct, frozen=True):
    """What was written: bytes of the file, bits per weight of its tensors, seconds it took."""

    path: str
    recipe: str
    size_bytes: int
    bpw: float
    seconds: float
    notes: tuple[str, ...]


def quantize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: str | Recipe,
    *,
    tensor_rules: Sequence[TensorRule] = (),
    importance: Importance | None = None,
    requantize: bool = False,
    force: bool = False,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> QuantizeResult:
    """Write `source` (any part, when it is split) to `destination` as the recipe says: a name, the path of a
    recipe file, or a Recipe; tensor_rules come before it, importance is the imatrix.

    Raises HomeinferError for whatever is wrong before, during or after; KeyboardInterrupt and what
    on_progress raises pass through.
    """
    began = time.monotonic()
    with Quantizer() as quantizer:
        header = read_header(source)
        made = resolved_recipe(header, recipe, tensor_rules)
        target = checked_destination(Path(destination), header, force)
        partial = target.with_name(f".homeinfer-{secrets.token_hex(4)}.partial")
        request = quantize_request(header, made, partial, importance=importance, requantize=requantize, threads=threads)
        planned = quantizer.plan(request, path_name(Path(header.files[0].path)), importance)
        if planned.needs_imatrix:
            raise imatrix_needed(f"recipe {made.name}")
        tensors = checked_plan(header, planned, made, importance)
        if not requantize and not made.copy:
            refuse_requantizing(header, tensors, made)
        require_space(target, file_bytes(header, tensors, added_metadata(header, made, importance)))
        with EarlySync(partial, path_name(target)) as sync:
            quantizer.run(target, _progress(header, planned, on_progress))
            sync.complete()
            _require_complete(partial, target, tensors)
        size = _publish(partial, target)
    return QuantizeResult(
        path=os.fspath(destination),
        recipe=made.name,
        size_bytes=size,
        bpw=round(8 * sum(tensor.bytes for tensor in tensors) / header.n_weights, 4),
        seconds=round(time.monotonic() - began, 3),
        notes=all_notes(header, tensors, made, planned, importance),
    )


def resolved_recipe(header: Header, recipe: str | Recipe, tensor_rules: Sequence[TensorRule]) -> Recipe:
    """The recipe for this model with the rules applied; HomeinferError for what can't be."""
    made = named_recipe(recipe, header) if isinstance(recipe, str) else recipe
    return with_tensor_rules(made, header, tensor_rules)


def _progress(
    header: Header, planned: Planned, on_progress: Callable[[Progress], None] | None
) -> Callable[[Started], None]:
    weights = {tensor.name: tensor.n_weights for tensor in header.tensors}
    done = [0, *accumulate(weights[name] for name, _ in planned.types)]

    def started(message: Started) -> None:
        if on_progress is not None:
            fraction = done[message.index - 1] / max(done[-1], 1)
            on_progress(Progress(message.index, message.count, message.name, fraction))

    return started


def _require_complete(partial: Path, target: Path, tensors: tuple[PlannedTensor, ...]) -> None:
    """llama.cpp's stream does not report every failed write, so the file itself is asked."""
    try:
        written = {tensor.name: tensor.type for tensor in read_header(partial).tensors}
    except HomeinferError:
        raise not_written(target) from None
    if written != {tensor.name: tensor.type for tensor in tensors}:
        raise HomeinferError(f"{path_name(target)}: llama.cpp wrote other types than it planned; report this as a bug")


def _publish(partial: Path, target: Path) -> int:
    """Give the complete file its name; returns its size in bytes."""
    try:
        size = partial.stat().st_size
        partial.replace(target)
    except OSError as error:
        raise cannot_be_written(path_name(target), error) from None
    return size
