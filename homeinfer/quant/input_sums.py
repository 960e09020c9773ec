"""What the input rows of a weight add up to: their second moments, first rows, and what 8-bit rounding does to them."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

NOISE_ROWS = 2048
"""About how many rows the noise is measured on, evenly spread over all."""
_PANEL = 256
_LARGEST_HALF = 65504.0


class Noise(msgspec.Struct, frozen=True):
    """Sums over n_rows rows of the squared error of each channel, float64 [n_in], when llama.cpp's CPU kernels round
    a row to Q8_K (one float32 scale per 256) or Q8_0 (one float16 scale per 32)."""

    q8_k: Doubles
    q8_0: Doubles
    n_rows: int


class InputSums:
    """Sums over the rows of one input, float32 [n, width] at a time."""

    def __init__(self, width: int, *, is_gram: bool, noise_step: int) -> None:
        """noise_step: every how many rows one is rounded."""
        self._is_gram = is_gram
        self._step = noise_step
        self._gram: Floats = np.zeros((width, width) if is_gram else (0, 0), np.float32)
        self._diagonal = np.zeros(width)
        self._firsts: list[Floats] = []
        self._noise = np.zeros((2, width))
        self._noise_rows = 0
        self.n_rows = 0

    def add(self, rows: Floats) -> None:
        if self._is_gram:
            _add_upper(self._gram, rows)
        else:
            self._diagonal += np.einsum("ij,ij->j", rows, rows)
        # counted over all rows, not from the start of these: first rows are unlike others and must not be preferred
        sample = rows[(self._step // 2 - self.n_rows) % self._step :: self._step]
        self._noise += (rounding_errors(sample, 256), rounding_errors(sample, 32, half_scale=True))
        self._noise_rows += len(sample)
        self.n_rows += len(rows)

    def add_firsts(self, rows: Floats) -> None:
        self._firsts.append(rows.copy())

    def gram(self) -> Floats:
        """Xᵀ·X, float32 [width, width]."""
        _mirror(self._gram)
        return self._gram

    def diagonal(self) -> Doubles:
        """Of Xᵀ·X, float64 [width]."""
        return self._diagonal

    def firsts(self) -> Floats:
        """float32 [n, width]."""
        return np.concatenate(self._firsts) if self._firsts else np.empty((0, self._noise.shape[1]), np.float32)

    def noise(self) -> Noise:
        return Noise(self._noise[0], self._noise[1], self._noise_rows)


def rounding_errors(rows: Floats, block: int, *, half_scale: bool = False) -> Doubles:
    """Sums over rows (float32 [n, width]) of the squared error of each channel when every `block` values are rounded to
    8 bits with one scale, a float16 or a float32: quantize_row_q8_0, quantize_row_q8_K. float64 [width]."""
    n, width = rows.shape
    values = np.pad(rows, ((0, 0), (0, -width % block))).reshape(n, -(-width // block), block)
    with np.errstate(all="ignore"):  # rows that are not finite are found, and said, by their sums
        scale = np.abs(values).max(axis=2, keepdims=True) / np.float32(127)
        errors = values * np.where(scale > 0, 1 / scale, 0)
        np.rint(errors, out=errors)
        errors *= np.minimum(scale, _LARGEST_HALF).astype(np.float16).astype(np.float32) if half_scale else scale
        errors -= values
        errors *= errors
        sums: Doubles = errors.sum(axis=0, dtype=np.float64).ravel()
    return sums[:width]


def estimated_noise(mean_squares: Doubles, block: int) -> Doubles:
    """Mean squared rounding errors, float64 [n], guessed from mean squares where there were no rows to round: the
    largest of `block` normal values is about √(2·ln(block)) times their size, and errors are even within a step."""
    width = len(mean_squares)
    starts = np.arange(0, width, block)
    means = np.add.reduceat(mean_squares, starts) / np.diff(np.append(starts, width))
    return np.repeat(2 * math.log(block) / 127**2 / 12 * means, block)[:width]


def _add_upper(gram: Floats, rows: Floats) -> None:
    """Add Xᵀ·X above the diagonal, in panels: half the work, and no pass over all of it to mirror a piece."""
    for start in range(0, rows.shape[1], _PANEL):
        gram[start : start + _PANEL, start:] += rows[:, start : start + _PANEL].T @ rows[:, start:]


def _mirror(gram: Floats) -> None:
    width = len(gram)
    for start in range(0, width, _PANEL):
        end = min(start + _PANEL, width)
        square = gram[start:end, start:end]
        square[:] = np.triu(square) + np.triu(square, 1).T
        gram[end:, start:end] = gram[start:end, end:].T
