"""What is measured of a model before its types are chosen: errors per type and sensitivities. All of it is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from homeinfer.model.header import Header, TensorInfo
from homeinfer.quant.error_tables import SAMPLE_ROWS, SAMPLE_ROWS_OUTSIDE, ErrorTable, measure_errors
from homeinfer.quant.inputs import Factors, Floats, Inputs, Known
from homeinfer.quant.rounding import dequantize_rows, stock_rows
from homeinfer.quant.sensitivity import Sensitivity, assumed, measure_sensitivity
from homeinfer.quant.source_weights import SourceWeights
from homeinfer.quant.tensor_encoding import is_exact_type
from homeinfer.quant.tensor_types import stack_and_layer

Ints = npt.NDArray[np.int32]
OnStage = Callable[[str, float], None]

PERTURBATION = {256: "IQ4_XS", 32: "IQ4_NL"}
"""Errors by which sensitivity is measured: small enough for KLD to grow in proportion, large enough to be seen."""
SENSITIVITY_CHUNKS = 3
_ROWS_WEIGHTS = 16 << 20
SENSITIVITY_BINS = 5


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that allocation and rounding need to know of a model."""

    known: Known
    errors: ErrorTable
    sensitivity: Sensitivity


def measure_tables(
    weights: SourceWeights,
    known: Known,
    types: dict[str, tuple[str, ...]],
    tensors: Sequence[TensorInfo],
    folder: Path,
    threads: int,
    on_progress: Callable[[float], None],
) -> ErrorTable:
    """The errors of each tensor as each of its types, those kept in the folder not again."""
    table, factors = ErrorTable(folder / "errors.jsonl"), Factors()
    for index, tensor in enumerate(tensors):
        missing = table.missing(tensor.name, types[tensor.name])
        if missing:
            inputs = known.of(tensor.name, tensor.shape[0])
            table.add(tensor.name, measure_errors(_sample(weights, tensor), inputs, missing, factors, threads))
        on_progress((index + 1) / len(tensors))
    return table


def measure_or_assume(
    header: Header,
    weights: SourceWeights,
    known: Known,
    tensors: Sequence[TensorInfo],
    chunks: Sequence[Ints],
    folder: Path,
    threads: int,
    on_progress: Callable[[float], None],
) -> tuple[Sensitivity, tuple[str, ...]]:
    """Sensitivities, and a note where they could not be measured: each group takes a pass over the model, which must
    be in memory for that."""
    names = [tensor.name for tensor in tensors]
    if not chunks or header.nbytes > psutil.virtual_memory().available:
        why = "there is no text" if not chunks else "the model is larger than this machine's free memory"
        return assumed(header, names), (f"how much each part matters was assumed, not measured: {why}",)

    def perturbed(name: str) -> tuple[Floats, float]:
        tensor = header.by_name[name]
        inputs = known.of(name, tensor.shape[0])
        sample = _sample(weights, tensor)
        error = inputs.relative_error(_with_error(sample, inputs, threads), sample)
        whole = weights.rows(tensor, 0, weights.n_rows(tensor))
        return _with_error(whole, inputs, threads), error

    picked = [chunks[i] for i in np.linspace(0, len(chunks) - 1, min(SENSITIVITY_CHUNKS, len(chunks))).astype(int)]
    found = measure_sensitivity(
        header, names, picked, perturbed, bins=SENSITIVITY_BINS, threads=threads, folder=folder, on_progress=on_progress
    )
    return found, ()


def refuse_broken(header: Header) -> None:
    """Raise HomeinferError that names the first tensor with NaN or infinite values, if there is one; reads them all."""
    with SourceWeights(header) as weights:
        for tensor in header.tensors:
            if is_exact_type(tensor.type):
                step = max(1, _ROWS_WEIGHTS // tensor.shape[0])
                for start in range(0, weights.n_rows(tensor), step):
                    weights.rows(tensor, start, min(start + step, weights.n_rows(tensor)))


def _with_error(weights: Floats, inputs: Inputs, threads: int) -> Floats:
    width = weights.shape[1]
    type_name = PERTURBATION[256 if width % 256 == 0 else 32]
    return dequantize_rows(type_name, stock_rows(type_name, weights, inputs.importance, threads=threads), width)


def _sample(weights: SourceWeights, tensor: TensorInfo) -> Floats:
    in_layer = stack_and_layer(tensor.name) is not None
    return weights.sample(tensor, SAMPLE_ROWS if in_layer else SAMPLE_ROWS_OUTSIDE)
