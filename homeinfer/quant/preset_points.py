"""llama.cpp's presets near a size, with the same importance and measured on the same text: what to compare with."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header
from homeinfer.quant.dry_run import dry_run
from homeinfer.quant.evaluate import evaluate
from homeinfer.quant.importance import Importance
from homeinfer.quant.inputs import Floats, Known
from homeinfer.quant.quantize import quantize
from homeinfer.quant.report_data import CurvePoint

PRESETS = ("IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
MOST = 3


def nearest_presets(header: Header, importance: Importance, size_bytes: int) -> tuple[str, ...]:
    """The presets whose files come nearest to a size, smallest first; those that llama.cpp refuses are left out."""
    sizes = {}
    for preset in PRESETS:
        try:
            sizes[preset] = dry_run(header.files[0].path, preset, importance=importance).size_bytes
        except HomeinferError:
            continue
    near = sorted(sizes, key=lambda preset: abs(math.log(sizes[preset] / size_bytes)))[:MOST]
    return tuple(sorted(near, key=sizes.__getitem__))


def preset_points(
    header: Header,
    known: Known,
    size_bytes: int,
    folder: Path,
    text: str,
    chunks: int,
    threads: int,
    requantize: bool,
    on_progress: Callable[[float], None],
) -> tuple[CurvePoint, ...]:
    """Make each near preset in `folder`, measure it, remove it. What can't be made is left out."""
    importance = _importance(header, known)
    names = nearest_presets(header, importance, size_bytes)
    points = []
    with tempfile.TemporaryDirectory(prefix=".homeinfer-", dir=folder) as temporary:
        for index, preset in enumerate(names):
            on_progress(index / len(names))
            made = Path(temporary) / f"{preset}.gguf"
            try:
                result = quantize(
                    header.files[0].path, made, preset, importance=importance, requantize=requantize, threads=threads
                )
                found = evaluate(made, header.files[0].path, text, chunks=chunks, threads=threads)
            except HomeinferError:
                continue
            finally:
                made.unlink(missing_ok=True)
            points.append(CurvePoint(preset, result.size_bytes, found.mean_kld, "preset"))
    return tuple(points)


def _importance(header: Header, known: Known) -> Importance:
    """What was seen of the inputs, for llama.cpp: one row per expert."""
    values: dict[str, Floats] = {}
    for tensor in header.tensors:
        if known.method(tensor.name) == "plain":
            continue
        row = known.of(tensor.name, tensor.shape[0]).importance
        if row is not None:
            # nothing but zeros would make some types divide by them
            floor = max(float(row.mean()), 1e-20) * 1e-6
            experts = tensor.n_weights // (tensor.shape[0] * tensor.shape[1])
            values[tensor.name] = np.tile(np.maximum(row, floor), experts).astype(np.float32)
    return Importance(values)
