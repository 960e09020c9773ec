"""Rounding with input moments against llama.cpp's own, read back by llama.cpp's own dequantizers."""

from __future__ import annotations

import functools
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer import _native
from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import TYPE_NUMBERS, TYPE_SIZES
from homeinfer.quant.rounding import (
    ROUNDABLE,
    Factor,
    dequantize_rows,
    factor,
    output_error,
    round_rows,
    stock_rows,
)

Floats = npt.NDArray[np.float32]
ROWS = 21
NARROW = sorted(name for name in ROUNDABLE if TYPE_SIZES[name][0] == 32)
WIDE = sorted(ROUNDABLE - set(NARROW))
CASES = [(name, n) for name in sorted(ROUNDABLE) for n in (256, 768)] + [
    (name, n) for name in NARROW for n in (32, 576)
]


def _weights(n: int, rows: int = ROWS) -> Floats:
    return np.random.default_rng(n).standard_normal((rows, n), np.float32) * np.float32(0.05)


def _moments(n: int) -> Floats:
    return _made_moments(n).copy()


@functools.cache
def _made_moments(n: int) -> Floats:
    """Inputs that are correlated as a model's are: a few strong directions, channels of different size."""
    rng = np.random.default_rng(n + 1)
    inputs = rng.standard_normal((2 * n, n // 4)) @ rng.standard_normal((n // 4, n)) + rng.standard_normal((2 * n, n))
    inputs *= np.exp(rng.standard_normal(n) / 2)
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


@functools.cache
def _factor(n: int) -> Factor:
    return factor(_made_moments(n))


def _loss(type_name: str, packed: npt.NDArray[np.uint8], weights: Floats, moments: Floats) -> float:
    return output_error(dequantize_rows(type_name, packed, weights.shape[1]) - weights, moments)


@pytest.mark.parametrize(("type_name", "n"), CASES)
def test_loses_less_at_the_output_than_llama_cpp_rounding(type_name: str, n: int) -> None:
    weights, moments = _weights(n), _moments(n)
    rounded = _loss(type_name, round_rows(type_name, weights, _factor(n)), weights, moments)
    stock = _loss(type_name, stock_rows(type_name, weights, np.diag(moments)), weights, moments)
    assert rounded < (0.7 if n > 32 else 1.0) * stock


@pytest.mark.parametrize("type_name", sorted(ROUNDABLE))
def test_what_ggml_reads_is_what_the_feedback_counted_on(type_name: str) -> None:
    """The errors that come back are U^-T of the real ones: their squares' sum is the proxy loss of what was written."""
    weights, moments = _weights(256), _moments(256)
    made = _factor(256)
    packed = stock_rows(type_name, weights, np.ones(256, np.float32))
    errors = weights.copy()
    _round_super_block(type_name, errors, packed, made)
    damped = moments.astype(np.float64) + 0.01 * np.diag(moments).mean() * np.eye(256)
    delta = dequantize_rows(type_name, packed, 256).astype(np.float64) - weights
    per_row = np.einsum("ij,jk,ik->i", delta, damped, delta)
    np.testing.assert_allclose(np.square(errors, dtype=np.float64).sum(1), per_row, rtol=2e-3)


def _round_super_block(type_name: str, errors: Floats, packed: npt.NDArray[np.uint8], made: Factor) -> None:
    from homeinfer.quant.rounding import _factors, _grid

    n = errors.shape[1]
    upper = np.zeros((n, 256), np.float32)
    upper[:, :n] = made.upper
    arrays = (errors, packed, upper, made.inverse_diagonal, _factors(type_name), *_grid(type_name))
    _native.round_super_block(TYPE_NUMBERS[type_name], len(errors), n, *arrays)


@pytest.mark.parametrize("type_name", sorted(ROUNDABLE))
def test_rows_of_zeros_stay_zero(type_name: str) -> None:
    weights = _weights(512)
    weights[[0, 7, 20]] = 0
    values = dequantize_rows(type_name, round_rows(type_name, weights, _factor(512)), 512)
    assert not values[[0, 7, 20]].any()
    assert values[[1, 8, 19]].any(axis=1).all()


@pytest.mark.parametrize("type_name", sorted(ROUNDABLE))
def test_channels_without_any_input_do_no_harm(type_name: str) -> None:
    weights, moments = _weights(512), _moments(512)
    dead = np.r_[3, 100:180, 256:512]
    moments[dead] = moments[:, dead] = 0
    weights[:, 256:512] = 0
    packed = round_rows(type_name, weights, factor(moments))
    assert not dequantize_rows(type_name, packed, 512)[:, 256:].any()
    stock = stock_rows(type_name, weights, np.diag(moments) + np.float32(1e-3))
    assert _loss(type_name, packed, weights, moments) < _loss(type_name, stock, weights, moments)


@pytest.mark.parametrize("type_name", sorted(ROUNDABLE))
def test_the_number_of_threads_changes_nothing(type_name: str) -> None:
    weights, made = _weights(512, 70), _factor(512)
    one = round_rows(type_name, weights, made, threads=1)
    assert np.array_equal(one, round_rows(type_name, weights, made, threads=3))
    assert np.array_equal(one[:5], round_rows(type_name, weights[:5], made, threads=2))
    stock = stock_rows(type_name, weights, None if type_name[:3] != "IQ2" else np.ones(512, np.float32), threads=1)
    again = stock_rows(type_name, weights, None if type_name[:3] != "IQ2" else np.ones(512, np.float32), threads=3)
    assert np.array_equal(stock, again)


@pytest.mark.parametrize("type_name", sorted(ROUNDABLE))
def test_rows_of_any_magnitude_come_back_finite(type_name: str) -> None:
    sizes = np.array([1e-44, 1e-38, 1e-20, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e3, 1e5, 1e7, 1e10, 1e20, 1e38], np.float64)
    weights = (_weights(512, len(sizes)) * 20 * sizes[:, None]).clip(-3e38, 3e38).astype(np.float32)
    weights[3, ::2] = 1e8
    values = dequantize_rows(type_name, round_rows(type_name, weights, _factor(512)), 512)
    assert np.isfinite(values).all()
    assert np.corrcoef(values[8], weights[8])[0, 1] > 0.5


@pytest.mark.parametrize("type_name", sorted(ROUNDABLE))
def test_scales_among_the_smallest_halves_lose_no_more_than_llama_cpp(type_name: str) -> None:
    weights, moments = _weights(512) * np.float32(1e-4), _moments(512)
    rounded = _loss(type_name, round_rows(type_name, weights, _factor(512)), weights, moments)
    stock = _loss(type_name, stock_rows(type_name, weights, np.diag(moments)), weights, moments)
    assert rounded <= 1.01 * stock


def test_the_source_is_left_as_it_was() -> None:
    weights, made = _weights(512), _factor(512)
    before = weights.copy()
    round_rows("Q3_K", weights, made)
    round_rows("Q3_K", np.asfortranarray(weights), made)
    assert np.array_equal(weights, before)


def test_the_factor_is_that_of_the_inverse() -> None:
    moments = _moments(320)
    made = factor(moments, damping=0.02)
    upper = made.upper.astype(np.float64) + np.diag(1 / made.inverse_diagonal.astype(np.float64))
    damped = moments.astype(np.float64) + 0.02 * np.diag(moments).mean() * np.eye(320)
    assert not np.tril(made.upper).any()
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(320), atol=1e-4)


@pytest.mark.parametrize("problem", ["nan", "zero", "negative"])
def test_moments_that_are_none_are_an_error(problem: str) -> None:
    moments = _moments(64)
    if problem == "nan":
        moments[3, 5] = np.nan
    else:
        moments *= 0 if problem == "zero" else np.where(np.arange(64) == 9, -1, 1).astype(np.float32)
    with pytest.raises(HomeinferError, match="moments"):
        factor(moments)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "IQ2_XXS", "TQ2_0", "Q4_K"])
def test_stock_rows_are_what_the_dequantizers_of_gguf_read(type_name: str) -> None:
    weights = _weights(512)
    packed = stock_rows(type_name, weights, np.ones(512, np.float32))
    values = dequantize_rows(type_name, packed, 512)
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[type_name]).reshape(ROWS, 512)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)
    assert np.square(values - weights).sum() < 0.8 * np.square(weights).sum()


def test_a_type_that_needs_importance_says_so() -> None:
    with pytest.raises(HomeinferError, match="importance"):
        stock_rows("IQ2_XXS", _weights(256), None)
    with pytest.raises(HomeinferError, match="importance"):
        stock_rows("Q4_K", _weights(256), np.full(256, np.nan, np.float32))


@pytest.mark.parametrize("type_name", ["F16", "Q4_0", "IQ3_S"])
def test_weights_that_are_not_finite_are_an_error(type_name: str) -> None:
    weights = _weights(256)
    weights[3, 4] = np.inf
    with pytest.raises(HomeinferError, match="finite"):
        stock_rows(type_name, weights, None)


def test_what_does_not_fit_together_is_an_error() -> None:
    made = _factor(256)
    with pytest.raises(HomeinferError, match="multiple of 256"):
        round_rows("Q4_K", _weights(288), made)
    with pytest.raises(HomeinferError, match="256"):
        round_rows("Q4_K", _weights(512), made)
    with pytest.raises(HomeinferError, match="IQ1_S"):
        round_rows("IQ1_S", _weights(256), made)
    with pytest.raises(HomeinferError, match="rows of 512 weights"):
        dequantize_rows("Q4_K", np.zeros((2, 144), np.uint8), 512)


@pytest.mark.parametrize("wrong", range(10))
def test_native_rounding_refuses_buffers_of_the_wrong_size(wrong: int) -> None:
    from homeinfer.quant.rounding import _factors, _grid

    weights, made = _weights(256, 4), _factor(256)
    arrays: list[npt.NDArray[Any]] = [
        weights.copy(),
        stock_rows("IQ3_S", weights, None),
        np.ascontiguousarray(made.upper),
    ]
    arrays += [made.inverse_diagonal, _factors("IQ3_S"), *(part.copy() for part in _grid("IQ3_S"))]
    with pytest.raises(ValueError, match="type"):
        _native.round_super_block(TYPE_NUMBERS["IQ1_S"], 4, 256, *arrays)
    with pytest.raises(ValueError, match="blocks"):
        _native.round_super_block(TYPE_NUMBERS["IQ3_S"], 4, 128, *arrays)
    arrays[wrong] = arrays[wrong].reshape(-1)[:-1].copy()
    with pytest.raises(ValueError, match=r"rows|factor|grid"):
        _native.round_super_block(TYPE_NUMBERS["IQ3_S"], 4, 256, *arrays)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_halves_are_rounded_as_numpy_does(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    made, back = np.empty(len(bits), np.uint16), values.copy()
    _native.half_bits(back, made)
    known = ~np.isnan(values)
    assert np.array_equal(made[known], expected[known].view(np.uint16))
    assert np.isnan(back[~known]).all()
    assert np.array_equal(back[known], expected[known].astype(np.float32))


def test_every_half_and_every_tie_between_two_is_rounded_as_numpy_does() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([halves, -halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.inf)])
    values = values.astype(np.float32)
    made = np.empty(len(values), np.uint16)
    expected = values.astype(np.float16).view(np.uint16)
    _native.half_bits(values, made)
    assert np.array_equal(made, expected)
