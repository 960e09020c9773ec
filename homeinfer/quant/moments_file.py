"""The files of kept moments: one folder for a model and its tokens.

INDEX says which weight has which input; input number N has N.npz with what is small and N.npy with XᵀX / n, float32
[width, width], where that is kept. PLAN is the index before all inputs are there. Every file appears whole or not at
all, and what is read is checked: a damaged file counts as missing.
"""

from __future__ import annotations

import functools
import io
import os
import secrets
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer.quant.input_sums import estimated_noise
from homeinfer.quant.observe import Mode, Observed

Floats = npt.NDArray[np.float32]

FORMAT = 1
INDEX, PLAN = "index.json", "plan.json"
_PARTIAL = ".partial"
_DAMAGES = (
    *(OSError, ValueError, KeyError, EOFError, OverflowError, MemoryError, RuntimeError, SyntaxError, TypeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"""What zipfile and NumPy raise on bytes that they did not write."""
_ROWS_AT_ONCE = 64
_FLOAT_BYTES = 4


class Input(msgspec.Struct, frozen=True):
    """What reaches one weight, or several; name is the first of them. width counts channels, n_rows rows.

    is_stacked: the weight is several matrices that every token passes; its moments are the mean over them.
    """

    name: str
    width: int
    n_rows: int
    has_gram: bool
    has_firsts: bool
    is_stacked: bool = False

    @property
    def mode(self) -> Mode:
        return Mode.SUM2 if self.is_stacked else Mode.GRAM if self.has_gram else Mode.DIAGONAL


class Index(msgspec.Struct, frozen=True):
    """model and tokens are digests; weights has the number of each weight's input; unobserved are those without."""

    format: int
    model: str
    tokens: str
    n_chunks: int
    inputs: tuple[Input, ...]
    weights: dict[str, int]
    unobserved: tuple[str, ...]

    def holds(self, model: str, tokens: str, weights: Iterable[str]) -> bool:
        """Whether it is of this model and these tokens and has these weights."""
        known = self.weights.keys() | set(self.unobserved)
        return (self.format, self.model, self.tokens) == (FORMAT, model, tokens) and known.issuperset(weights)


class Small(msgspec.Struct, frozen=True):
    """All but the gram of an input, float32 [width] each: mean squares, mean squared errors of rounding to Q8_K and
    Q8_0; firsts is [n, width]."""

    squares: Floats
    q8_k: Floats
    q8_0: Floats
    firsts: Floats


def nbytes(entry: Input, n_chunks: int) -> int:
    """What an input takes in memory and on the disk, about."""
    rows = (entry.width if entry.has_gram else 0) + n_chunks + 8
    return rows * entry.width * _FLOAT_BYTES


def gram_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def small_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npz"


def write_index(folder: Path, name: str, index: Index) -> None:
    _write(folder / name, lambda file: file.write(msgspec.json.encode(index)))


def read_index(folder: Path, name: str) -> Index | None:
    try:
        return msgspec.json.decode((folder / name).read_bytes(), type=Index)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def write_inputs(folder: Path, inputs: Mapping[int, Input], observed: Observed) -> None:
    """Write what was observed; grams are divided in place. Raises OSError."""
    for number, entry in inputs.items():
        small = _small_stacked(entry, observed) if entry.is_stacked else _small(entry, observed)
        if entry.has_gram:
            gram = observed.grams[entry.name]
            gram *= np.float32(1 / observed.n_rows[entry.name])
            _write(gram_path(folder, number), functools.partial(np.save, arr=gram))
        _write(small_path(folder, number), functools.partial(np.savez, **msgspec.structs.asdict(small)))


def _small(entry: Input, observed: Observed) -> Small:
    name, width = entry.name, entry.width
    if entry.has_gram:  # divided already
        squares = np.diag(observed.grams[name])
    else:
        squares = (observed.diagonals[name] / observed.n_rows[name]).astype(np.float32)
    noise = observed.noise[name]
    n_noise = max(noise.n_rows, 1)
    return Small(
        squares=squares,
        q8_k=(noise.q8_k / n_noise).astype(np.float32),
        q8_0=(noise.q8_0 / n_noise).astype(np.float32),
        firsts=observed.firsts[name] if entry.has_firsts else np.empty((0, width), np.float32),
    )


def _small_stacked(entry: Input, observed: Observed) -> Small:
    sums = observed.squares[entry.name].in_sum2.reshape(-1, entry.width)
    counts = observed.squares[entry.name].counts
    n_rows = counts.sum() * (len(sums) if len(counts) == 1 else 1)
    means = sums.sum(axis=0) / max(n_rows, 1)
    return Small(
        squares=means.astype(np.float32),
        q8_k=estimated_noise(means, 256).astype(np.float32),
        q8_0=estimated_noise(means, 32).astype(np.float32),
        firsts=np.empty((0, entry.width), np.float32),
    )


def read_small(folder: Path, number: int, entry: Input) -> Small | None:
    """None where it is missing or damaged."""
    try:
        with zipfile.ZipFile(small_path(folder, number)) as arrays:
            small = Small(*(np.load(io.BytesIO(arrays.read(f"{name}.npy"))) for name in Small.__struct_fields__))
    except _DAMAGES:
        return None
    vectors = (small.squares, small.q8_k, small.q8_0)
    shaped = all(array.shape == (entry.width,) for array in vectors) and small.firsts.shape[1:] == (entry.width,)
    floats = all(array.dtype == np.float32 for array in (*vectors, small.firsts))
    return small if shaped and floats and all(map(_is_finite, (*vectors, small.firsts))) else None


def map_gram(folder: Path, number: int, entry: Input) -> Floats | None:
    """The mapped file; None where it is missing or has another shape or type, or is cut short."""
    try:
        gram = np.load(gram_path(folder, number), mmap_mode="r", allow_pickle=False)
    except _DAMAGES:
        return None
    return gram if gram.shape == (entry.width, entry.width) and gram.dtype == np.float32 else None


def is_whole(folder: Path, number: int, entry: Input) -> bool:
    """Whether all of an input is there and finite; reads all of it."""
    if read_small(folder, number, entry) is None:
        return False
    if not entry.has_gram:
        return True
    gram = map_gram(folder, number, entry)
    return gram is not None and _is_finite(gram)


def remove_inputs(folder: Path) -> None:
    """Remove all moments, for instance another model's. Raises OSError."""
    for name in (INDEX, PLAN):
        (folder / name).unlink(missing_ok=True)
    for pattern in ("[0-9]*.npy", "[0-9]*.npz"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def remove_partial(folder: Path, is_alive: Callable[[int], bool]) -> None:
    """Remove what processes that are gone were writing."""
    for path in folder.glob(f".*{_PARTIAL}"):
        pid = path.name.split(".")[-3]
        if not (pid.isdecimal() and is_alive(int(pid))):
            path.unlink(missing_ok=True)


def _is_finite(array: Floats) -> bool:
    array = np.asarray(array)
    # the extremes are NaN when any value is, and infinite when one is
    return all(
        bool(np.isfinite(part.max()) and np.isfinite(part.min()))
        for part in (array[start : start + _ROWS_AT_ONCE] for start in range(0, len(array), _ROWS_AT_ONCE))
    )


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
