"""The chosen types made real: every tensor rounded and written, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from homeinfer.model.header import Header, MetaValue, TensorInfo
from homeinfer.quant.inputs import Factors, Known
from homeinfer.quant.recipes import plan
from homeinfer.quant.rounding import ROUNDABLE, round_rows, stock_rows
from homeinfer.quant.source_weights import SourceWeights
from homeinfer.quant.tensor_encoding import is_exact_type
from homeinfer.quant.tensor_file import TensorFile

_PIECE_WEIGHTS = 16 << 20
"""Weights held in memory at once; rounding needs some five times that in float32."""


def write_rounded(
    path: Path,
    header: Header,
    types: Mapping[str, str],
    known: Known,
    added: Mapping[str, MetaValue],
    threads: int,
    on_progress: Callable[[float], None],
) -> int:
    """Write the model with these types (those not named keep theirs) to `path`; returns the bytes of its tensors.

    Raises OSError where the disk does, HomeinferError for weights that are no numbers.
    """
    tensors = plan(header, types.items())
    done = 0
    with SourceWeights(header) as weights, TensorFile(path, header, tensors, added) as file:
        factors = Factors()
        for info, tensor in zip(header.tensors, tensors, strict=True):
            if tensor.type == info.type:
                pieces = _copied(weights, info)
            else:
                pieces = _rounded(weights, info, tensor.type, known, factors, threads)
            file.add(pieces, tensor.bytes, lambda _count: None)
            done += info.n_weights
            on_progress(done / header.n_weights)
        file.finish()
    return sum(tensor.bytes for tensor in tensors)


def _copied(weights: SourceWeights, info: TensorInfo) -> Iterator[bytes]:
    if is_exact_type(info.type):
        for start, stop in _steps(weights, info):
            weights.rows(info, start, stop)  # raises where some are NaN
    yield weights.packed(info)


def _steps(weights: SourceWeights, info: TensorInfo) -> Iterator[tuple[int, int]]:
    step, n_rows = max(1, _PIECE_WEIGHTS // info.shape[0]), weights.n_rows(info)
    return ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _rounded(
    weights: SourceWeights, info: TensorInfo, type_name: str, known: Known, factors: Factors, threads: int
) -> Iterator[bytes]:
    inputs = known.of(info.name, info.shape[0])
    made = factors.of(inputs) if type_name in ROUNDABLE else None
    for start, stop in _steps(weights, info):
        rows = weights.rows(info, start, stop)
        if made is not None:
            yield round_rows(type_name, rows, made, threads=threads).tobytes()
        else:
            yield stock_rows(type_name, rows, inputs.importance, threads=threads).tobytes()
