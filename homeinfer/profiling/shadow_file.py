"""Fill a shadow window's file with random weights that are valid in every tensor type."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, TensorInfo, read_header
from homeinfer.quant.tensor_encoding import encode

_PIECE = 1 << 16
"""Weights that are drawn and quantized; a tensor is as many copies of them as it takes."""
_TILE = 1 << 22
_NOT_NEEDED = ("token_embd.weight",)
"""Placeholders: zeros, a hole in the file."""


def fill_shadow(path: Path, on_progress: Callable[[float], None] | None = None) -> None:
    """Write every tensor of a file that window_file.write_window left as a hole.

    Raises HomeinferError when the disk is full or can't be written.
    """
    header = read_header(path)
    done = 0
    try:
        with path.open("r+b") as file:
            for tensor in header.tensors:
                if tensor.name not in _NOT_NEEDED:
                    _write(file.fileno(), tensor)
                done += tensor.nbytes
                if on_progress is not None:
                    on_progress(done / max(header.nbytes, 1))
    except OSError as problem:
        raise HomeinferError(f"{path} can't be written: {problem.strerror or problem}; free some space there") from None


def _write(file: int, tensor: TensorInfo) -> None:
    values = _vector(tensor) if len(tensor.shape) == 1 else _matrix(tensor.type, "ssm_a" in tensor.name)
    done = 0
    while done < tensor.nbytes:
        phase = done % len(values)
        done += os.pwrite(file, values[phase : phase + tensor.nbytes - done], tensor.offset + done)


def _vector(tensor: TensorInfo) -> memoryview:
    """Norms, biases, scales: about 1, and what decays a state decays it."""
    values = np.random.default_rng(0).normal(1, 0.01, tensor.n_weights).astype(np.float32)
    if "ssm_a" in tensor.name:
        values = -values
    if tensor.type not in ("F32", "F16", "BF16"):
        return memoryview(bytes(tensor.nbytes))
    return memoryview(encode(tensor.type, values.reshape(1, -1)))


@cache
def _matrix(type_name: str, is_decay: bool) -> memoryview:
    """Small random weights, quantized by ggml itself, repeated to some MB. Integers are zeros."""
    weights, size = TYPE_SIZES[type_name]
    if type_name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"):
        return memoryview(bytes(_TILE // size * size))
    rows = np.random.default_rng(0).normal(0, 0.02, (_PIECE // 2048, 2048)).astype(np.float32)
    piece = encode(type_name, -np.abs(rows) if is_decay else rows)
    assert len(piece) == _PIECE // weights * size
    return memoryview(piece * (_TILE // len(piece)))
