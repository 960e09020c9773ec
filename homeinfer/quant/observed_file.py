"""An Observed as a file, from the process that observes to the one that asked: an index, then NumPy's arrays."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from homeinfer.quant.input_sums import Noise
from homeinfer.quant.observe import Observed, Squares


class _Index(msgspec.Struct, frozen=True):
    """What the arrays of an Observed in a result file are, in their order."""

    tokens: int
    squares: tuple[str, ...]
    grams: tuple[str, ...]
    diagonals: tuple[str, ...]
    firsts: tuple[str, ...]
    noise: dict[str, int]
    rows: tuple[str, ...]
    n_rows: dict[str, int]
    inputs: dict[str, str]
    unused: tuple[str, ...]


def write_observed(path: Path, observed: Observed) -> None:
    """Raises OSError."""
    index = _Index(
        tokens=observed.tokens,
        squares=tuple(observed.squares),
        grams=tuple(observed.grams),
        diagonals=tuple(observed.diagonals),
        firsts=tuple(observed.firsts),
        noise={name: each.n_rows for name, each in observed.noise.items()},
        rows=tuple(observed.rows),
        n_rows=observed.n_rows,
        inputs=observed.inputs,
        unused=observed.unused,
    )
    sums = [array for each in observed.squares.values() for array in (each.in_sum2, each.counts)]
    noise = [array for each in observed.noise.values() for array in (each.q8_k, each.q8_0)]
    single = (observed.grams, observed.diagonals, observed.firsts)
    with path.open("wb") as file:
        np.save(file, np.frombuffer(msgspec.json.encode(index), np.uint8))
        for array in (*sums, *(a for each in single for a in each.values()), *noise, *observed.rows.values()):
            np.save(file, array)


def read_observed(path: Path) -> Observed:
    """What `write_observed` wrote into this file."""
    with path.open("rb") as file:
        index = msgspec.json.decode(np.load(file).tobytes(), type=_Index)
        return Observed(
            tokens=index.tokens,
            squares={name: Squares(np.load(file), np.load(file)) for name in index.squares},
            grams={name: np.load(file) for name in index.grams},
            diagonals={name: np.load(file) for name in index.diagonals},
            firsts={name: np.load(file) for name in index.firsts},
            noise={name: Noise(np.load(file), np.load(file), n) for name, n in index.noise.items()},
            rows={name: np.load(file) for name in index.rows},
            n_rows=index.n_rows,
            inputs=index.inputs,
            unused=index.unused,
        )
