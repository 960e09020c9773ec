"""How much error each type would give each tensor, measured on some of its rows, and kept.

Rows are rounded independently of each other, so a sample of them says what all would give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable
from homeinfer.quant.inputs import Factors, Floats, Inputs
from homeinfer.quant.rounding import ROUNDABLE, dequantize_rows, round_rows, stock_rows

SAMPLE_ROWS = 96
"""Rows of a layer's matrix. Their error relative to their output spreads by some 30 %, the mean of 96 by 3."""
SAMPLE_ROWS_OUTSIDE = 768
"""Rows of the embedding and the output: one group of its own in the allocation, and a large one."""


class TypeError_(msgspec.Struct, frozen=True):
    """A tensor as this type. Errors are energies at its output relative to the output's own: of the weights as
    homeinfer rounds them, as llama.cpp does (with an imatrix), and of the activations' rounding, which comes on top."""

    type: str
    rounded: float
    stock: float
    noise: float


class TensorErrors(msgspec.Struct, frozen=True):
    """One line of the kept table."""

    name: str
    errors: tuple[TypeError_, ...]


def measure_errors(
    weights: Floats, inputs: Inputs, types: Sequence[str], factors: Factors, threads: int
) -> tuple[TypeError_, ...]:
    """The errors of these rows (float32 [m, n]) as each type."""
    found = []
    for type_name in types:
        stock = dequantize_rows(
            type_name, stock_rows(type_name, weights, inputs.importance, threads=threads), weights.shape[1]
        )
        error = inputs.relative_error(stock, weights)
        rounded = error
        made = factors.of(inputs) if type_name in ROUNDABLE else None
        if made is not None:
            packed = round_rows(type_name, weights, made, threads=threads)
            rounded = inputs.relative_error(dequantize_rows(type_name, packed, weights.shape[1]), weights)
        found.append(TypeError_(type_name, rounded, error, inputs.relative_noise(type_name, weights)))
    return tuple(found)


def make_folder(folder: Path) -> None:
    """Raises HomeinferError where it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise _not_kept(folder, problem) from None


def _not_kept(path: Path, problem: OSError) -> HomeinferError:
    return HomeinferError(
        f"{printable(str(path), 1000)}: measurements can't be kept there: {problem.strerror}; "
        "make room or set HOMEINFER_KEPT to another folder"
    )


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError:
        return []


class ErrorTable:
    """Lines in a file, appended as they are measured: whatever interrupts, what was measured is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, TypeError_]] = {}
        for line in _lines(path):
            # the last line of a process that was killed is cut short
            with contextlib.suppress(msgspec.DecodeError, UnicodeError, RecursionError):
                self._learn(msgspec.json.decode(line, type=TensorErrors))

    def missing(self, name: str, types: Sequence[str]) -> tuple[str, ...]:
        known = self._known.get(name, {})
        return tuple(type_name for type_name in types if type_name not in known)

    def add(self, name: str, errors: tuple[TypeError_, ...]) -> None:
        line = TensorErrors(name, errors)
        try:
            with self._path.open("ab") as file:
                file.write(b"\n" + msgspec.json.encode(line))
        except OSError as problem:
            raise _not_kept(self._path, problem) from None
        self._learn(line)

    def of(self, name: str, type_name: str) -> TypeError_:
        return self._known[name][type_name]

    def _learn(self, line: TensorErrors) -> None:
        self._known.setdefault(line.name, {}).update({error.type: error for error in line.errors})
