"""Weights to GGUF blocks and back: llama.cpp's own rounding, and one that knows the inputs' second moments.

`round_rows` is GPTQ (arXiv 2210.17323; LDLQ of arXiv 2307.13304 is the same): columns are rounded from left to right,
and what a column loses is made good by the columns right of it, as far as their inputs are correlated. The blocks are
ordinary ones: only which code and which scale a weight gets is chosen differently.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf.quants
import numpy as np
import numpy.typing as npt

from homeinfer import _native
from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import TYPE_NUMBERS, TYPE_SIZES

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SUPER_BLOCK = 256
_BLOCK_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S")
_BLOCK_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
ROUNDABLE = frozenset(_BLOCK_256 + _BLOCK_32)
"""The types that `round_rows` writes."""

_LARGEST = 3e8
"""More than any block can hold (65504 * 127 * 32 of Q6_K): larger weights are as good as this one, and the squares of
this one are still finite."""

_GRIDS = ("IQ3_S", "IQ3_XXS", "IQ2_S")
_WITH_MINIMUM = ("Q2_K", "Q4_K", "Q5_K", "Q4_1", "Q5_1")
_NEAR = (1.0, 0.92, 1.06)
_WIDE = (1.0, 0.76, 0.82, 0.88, 0.94, 0.97, 1.03, 1.06, 1.12)
"""What ggml's scales are tried times, per group of weights. Of 1.0 alone these leave 0.9 of the proxy loss for most
types (0.77 for Q8_0 and Q5_K) at hardly any time; more than _NEAR of a grid type gain 1 % and take as long again."""


def _factors(type_name: str) -> Floats:
    """Pairs to multiply scale and minimum by: float32 [any, 2], (1, 1) first."""
    wide = [(scale, scale) for scale in (_NEAR if type_name in _GRIDS else _WIDE)]
    apart = [(scale, minimum) for scale in _NEAR for minimum in _NEAR if scale != minimum]
    return np.array(wide + apart if type_name in _WITH_MINIMUM else wide, np.float32)


@dataclass(frozen=True)
class Factor:
    """(H + damping * mean(diag H) I)^-1 = U^T U with U upper triangular, as `round_rows` needs it.

    upper: float32 [n, n], U above its diagonal, 0 elsewhere; inverse_diagonal: float32 [n], 1 / U_jj.
    """

    upper: Floats
    inverse_diagonal: Floats


def factor(hessian: Floats, damping: float = 0.01) -> Factor:
    """The factor of a layer's input moments, hessian: [n, n], sum or mean of x x^T over calibration tokens.

    Channels that never had an input are fine. Raises HomeinferError for moments that are not finite or all 0.
    """
    n = len(hessian)
    moments = hessian.astype(np.float64)
    mean = float(np.trace(moments)) / n
    if not (np.isfinite(mean) and mean > 0 and np.isfinite(moments).all()):
        raise HomeinferError("the input moments of a layer are not finite or all 0; calibrate with other text")
    moments /= mean
    moments[np.diag_indices(n)] += damping
    try:
        reversed_lower = np.linalg.cholesky(moments[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise HomeinferError("the input moments of a layer are not positive; calibrate with more text") from None
    upper = _inverse_of_upper(np.ascontiguousarray(reversed_lower[::-1, ::-1])) / np.sqrt(mean)
    inverse_diagonal = (1 / np.diag(upper)).astype(np.float32)
    np.fill_diagonal(upper, 0)
    return Factor(upper.astype(np.float32), inverse_diagonal)


def _inverse_of_upper(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """By halves: nearly all of the work is products of matrices."""
    n = len(matrix)
    if n <= 64:
        return np.triu(np.linalg.inv(matrix))
    half = n // 2
    inverse = np.zeros_like(matrix)
    inverse[:half, :half] = _inverse_of_upper(matrix[:half, :half])
    inverse[half:, half:] = _inverse_of_upper(matrix[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ matrix[:half, half:]) @ inverse[half:, half:]
    return inverse


def round_rows(type_name: str, weights: Floats, factor: Factor, *, threads: int = 2) -> Bytes:
    """Blocks of a type of ROUNDABLE, uint8 [m, row_bytes], for weights [m, n], with about the least output error.

    Raises HomeinferError for weights that are not finite and for an n that is not whole blocks or not the factor's.
    """
    if type_name not in ROUNDABLE:
        raise HomeinferError(f"{type_name} has no rounding by input moments; it has {', '.join(sorted(ROUNDABLE))}")
    left = np.array(_checked(type_name, weights), order="C")
    m, n = left.shape
    if factor.upper.shape != (n, n) or factor.inverse_diagonal.shape != (n,):
        raise HomeinferError(f"the weights have {n} columns, their input moments {len(factor.inverse_diagonal)}")
    width, size = TYPE_SIZES[type_name]
    packed = np.empty((m, n // width * size), np.uint8)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, n, SUPER_BLOCK):
            stop = min(n, start + SUPER_BLOCK)
            block = np.clip(left[:, start:stop], -_LARGEST, _LARGEST)
            codes = _round_super_block(type_name, block, factor, start, _Rows(pool, m, threads))
            packed[:, start // width * size : stop // width * size] = codes
            if stop < n:
                left[:, stop:] -= block @ factor.upper[start:stop, stop:]
    return packed


@dataclass(frozen=True)
class _Rows:
    """So many rows, worked on in ranges by several threads; no row's result depends on the others."""

    pool: ThreadPoolExecutor
    n: int
    threads: int

    def each(self, work: Callable[[slice], None]) -> None:
        step = max(16, -(-self.n // (16 * max(1, self.threads))) * 16)
        list(self.pool.map(work, [slice(at, min(self.n, at + step)) for at in range(0, self.n, step)]))


def _round_super_block(type_name: str, block: Floats, factor: Factor, start: int, rows: _Rows) -> Bytes:
    """Codes of a super-block's columns, whose weights become the errors that are left to the columns right of it."""
    m, n = block.shape
    width, size = TYPE_SIZES[type_name]
    inverse = np.ascontiguousarray(factor.inverse_diagonal[start : start + n])
    importance = np.square(inverse / inverse.mean())
    upper = np.zeros((n, SUPER_BLOCK), np.float32)
    upper[:, :n] = factor.upper[start : start + n, start : start + n]
    scales = _factors(type_name)
    grid = _grid(type_name)
    codes = np.empty((m, n // width * size), np.uint8)
    quantize = _quantizer(type_name)

    def work(of: slice) -> None:
        part, count = block[of], of.stop - of.start
        quantize(TYPE_NUMBERS[type_name], part.ctypes.data, codes[of].ctypes.data, 0, count, n, importance.ctypes.data)
        _native.round_super_block(TYPE_NUMBERS[type_name], count, n, part, codes[of], upper, inverse, scales, *grid)

    rows.each(work)
    return codes


@functools.cache
def _grid(type_name: str) -> tuple[npt.NDArray[np.generic], ...]:
    """first, second, first_of, second_of, code of a grid type (native.round_super_block), empty for others."""
    if type_name not in _GRIDS:
        return tuple(np.empty(0, kind) for kind in (np.float32, np.float32, np.uint8, np.uint8, np.uint16))
    tables = getattr(gguf.quants, type_name)
    tables.init_grid()
    vectors = tables.grid.reshape(tables.grid.shape[-2:]).astype(np.float32)
    half = vectors.shape[1] // 2
    first, first_of = np.unique(vectors[:, :half], axis=0, return_inverse=True)
    second, second_of = np.unique(vectors[:, half:], axis=0, return_inverse=True)
    order = np.argsort(first_of.reshape(-1), kind="stable")
    return (
        np.ascontiguousarray(first),
        np.ascontiguousarray(second),
        first_of.reshape(-1)[order].astype(np.uint8),
        second_of.reshape(-1)[order].astype(np.uint8),
        order.astype(np.uint16),
    )


def stock_rows(type_name: str, weights: Floats, importance: Floats | None, *, threads: int = 2) -> Bytes:
    """Blocks as llama.cpp's own quantizer makes them (ggml_quantize_chunk): uint8 [m, row_bytes], any type it writes.

    weights: [m, n]; importance: [n], an imatrix's values (needed by IQ1 and IQ2 types). Raises HomeinferError for
    what ggml would abort the process on.
    """
    checked = np.ascontiguousarray(_checked(type_name, weights))
    m, n = checked.shape
    number = TYPE_NUMBERS[type_name]
    quantize = _quantizer(type_name)
    if importance is None:
        if runtime.ggml().ggml_quantize_requires_imatrix(number):
            raise HomeinferError(f"{type_name} can't be written without an importance matrix; give one")
        values = None
    else:
        values = np.ascontiguousarray(importance, np.float32)
        if values.shape != (n,) or not (np.isfinite(values).all() and (values >= 0).all()):
            raise HomeinferError(f"the importance of {n} columns has to be as many finite numbers, none negative")
    width, size = TYPE_SIZES[type_name]
    packed = np.empty((m, n // width * size), np.uint8)

    def work(of: slice) -> None:
        address = None if values is None else values.ctypes.data
        quantize(number, checked[of].ctypes.data, packed[of].ctypes.data, 0, of.stop - of.start, n, address)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        _Rows(pool, m, threads).each(work)
    return packed


def _checked(type_name: str, weights: Floats) -> Floats:
    """The weights as float32 [m, n], within what blocks hold."""
    if type_name not in TYPE_SIZES:
        raise HomeinferError(f"{type_name} is no tensor type")
    if weights.ndim != 2 or weights.shape[1] % TYPE_SIZES[type_name][0] != 0 or not weights.size:
        raise HomeinferError(f"{type_name} needs rows of a multiple of {TYPE_SIZES[type_name][0]}, not {weights.shape}")
    values = np.asarray(weights, np.float32)
    largest = max(float(values.max()), -float(values.min()))
    if not np.isfinite(largest):
        raise HomeinferError("a weight is not a finite number; the source file is damaged")
    if largest > _LARGEST and TYPE_SIZES[type_name][0] > 1:
        return np.clip(values, -_LARGEST, _LARGEST)
    return values


@functools.cache
def _quantizer(type_name: str) -> Callable[..., int]:
    """ggml_quantize_chunk, once its tables for the type are there (making them is not safe in two threads)."""
    library = runtime.ggml()
    library.ggml_quantize_init.argtypes = (ctypes.c_int,)
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_init(TYPE_NUMBERS[type_name])
    library.ggml_quantize_requires_imatrix.argtypes = (ctypes.c_int,)
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    quantize = library.ggml_quantize_chunk
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
    quantize.restype = ctypes.c_size_t
    return quantize


def dequantize_rows(type_name: str, packed: Bytes, n: int, *, threads: int = 2) -> Floats:
    """What llama.cpp reads from rows of blocks (ggml_type_traits.to_float): uint8 [m, row_bytes] to float32 [m, n]."""
    width, size = TYPE_SIZES.get(type_name, (0, 0))
    if not width or packed.ndim != 2 or n % width != 0 or packed.shape[1] != n // width * size:
        raise HomeinferError(f"{packed.shape} bytes are no rows of {n} weights as {type_name}")
    blocks = np.ascontiguousarray(packed, np.uint8)
    if type_name == "F32":
        return blocks.view(np.float32)
    found = runtime.to_float_address(TYPE_NUMBERS[type_name])
    if not found:
        raise HomeinferError(f"llama.cpp reads no {type_name} weights")
    to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(found)
    values = np.empty((len(blocks), n), np.float32)

    def work(of: slice) -> None:
        to_float(blocks[of].ctypes.data, values[of].ctypes.data, (of.stop - of.start) * n)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        _Rows(pool, len(blocks), threads).each(work)
    return values


def output_error(delta: Floats, hessian: Floats) -> float:
    """tr(D H D^T): the squared error of the outputs when weights change by delta [m, n] and inputs have moments H."""
    return float(np.einsum("ij,ij->", delta @ hessian, delta, dtype=np.float64))
