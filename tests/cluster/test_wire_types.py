"""Hidden states on the wire: how near they stay, how small they get, and what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from homeinfer.cluster.local import RingOptions
from homeinfer.cluster.planning.costs import WIRE_BYTES
from homeinfer.cluster.planning.plan import Wire
from homeinfer.cluster.wire.rows import pack, unpack
from homeinfer.engine.pipeline import Floats
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from tests.support.async_ring import async_ring, greedy
from tests.support.reference import agreement, references

WIRES: list[Wire] = ["f32", "f16", "bf16", "q8"]
NEAR: dict[Wire, float] = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8": 0.5 / 127 + 2**-10}
"""Largest error: of a number, in units of itself; with q8 of a block's largest one."""

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
some_rows = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.sampled_from([1, 31, 32, 33, 64])), elements=finite
)


def through(wire: Wire, rows: Floats) -> Floats:
    """Rows as they are behind the wire."""
    n, width = rows.shape
    return np.frombuffer(unpack(wire, pack(wire, rows.tobytes(), width), n, width), np.float32).reshape(n, width)


def residuals(n: int = 64, width: int = 576, most: float = 1e4) -> Floats:
    """Like a residual stream: mostly small numbers, a few channels that are huge in every row."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((n, width)).astype(np.float32)
    rows[:, [7, 300]] *= most
    return rows


@pytest.mark.parametrize("wire", WIRES)
@settings(derandomize=True, deadline=None)
@example(rows=np.array([[3.4028e38, -3.401993e38]], np.float32))
@given(rows=some_rows)
def test_what_goes_in_finite_comes_out_finite(wire: Wire, rows: Floats) -> None:
    assert np.isfinite(through(wire, rows)).all()


@pytest.mark.parametrize("wire", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("most", [1.0, 1e4, 1e6, 1e12])
def test_numbers_keep_their_first_digits_however_large(wire: Wire, most: float) -> None:
    rows = residuals(most=most)
    error = np.abs(through(wire, rows) - rows)
    scale = max(1.0, np.abs(rows).max() / 65504) if wire == "f16" else 1.0
    assert (error <= NEAR[wire] * np.abs(rows) + 2**-24 * 2 * scale).all()


def test_a_half_never_becomes_infinite_and_small_rows_stay_exact_halves() -> None:
    rows = np.array([[65504, 65519, 65520, -70000, 1], [1, 2, -0.5, 65504, 2**-24]], np.float32)
    got = through("f16", rows)
    assert np.abs(got / rows - 1).max() < 2**-10
    assert np.array_equal(got[1], rows[1])


@given(some_rows)
def test_halves_round_as_numpys_do(rows: Floats) -> None:
    rows = np.clip(rows, -65504, 65504)
    assert np.array_equal(through("f16", rows), rows.astype(np.float16).astype(np.float32))


def test_blocks_of_int8_are_near_in_units_of_their_largest_number() -> None:
    rows = residuals()
    blocks = rows.reshape(-1, 32)
    error = np.abs(through("q8", rows).reshape(-1, 32) - blocks)
    assert (error <= NEAR["q8"] * np.abs(blocks).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("wire", WIRES)
def test_sizes_are_those_that_the_planner_counts(wire: Wire) -> None:
    rows = residuals()
    nbytes = memoryview(pack(wire, rows.tobytes(), rows.shape[1])).nbytes
    per_row = 4 if wire == "f16" else 0
    assert nbytes - per_row * len(rows) == WIRE_BYTES[wire] * rows.size


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_refused_on_the_other_side(wire: Wire, bad: float) -> None:
    rows = residuals(3)
    rows[1, 40] = bad
    with pytest.raises(HomeinferError, match="hidden states that are not numbers"):
        through(wire, rows)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_rows_of_another_size_are_refused(wire: Wire, cut: int) -> None:
    packed = bytes(pack(wire, residuals(3).tobytes(), 576))
    with pytest.raises(HomeinferError, match=r"bytes for . rows of 576 numbers"):
        unpack(wire, packed[: len(packed) - cut], 3 if cut else 4, 576)


def test_rows_of_f32_are_not_copied() -> None:
    rows = memoryview(residuals(3).tobytes())
    assert pack("f32", rows, 576) is rows
    assert unpack("f32", rows, 3, 576) is rows


@pytest.mark.parametrize("wire", ["f16", "bf16", "q8"])
def test_a_ring_with_small_rows_still_counts(smollm2_path: Path, wire: Wire) -> None:
    expected = references(smollm2_path, ["1, 2, 3, 4, 5, 6, 7, 8,"], 12, longest=64, n_ctx=128)

    async def run() -> list[int]:
        options = RingOptions(n_ctx=128, n_batch=64, n_threads=1)
        async with async_ring(read_header(smollm2_path), [[(0, 10), (20, 30)], [(10, 20)]], options, wire=wire) as ring:
            return (await ring.answer(expected[0].prompt, greedy(12)))[0]

    assert agreement(expected, [asyncio.run(run())]).ties == 0
