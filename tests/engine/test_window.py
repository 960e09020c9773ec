"""Windows refuse what llama.cpp would abort on, and go on working."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from homeinfer.engine.edits import Copy, Keep, KvEdit, Remove, Shift
from homeinfer.engine.pipeline import Batch, Floats, Ints
from homeinfer.engine.window import LayerWindow
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from tests.support.windows import forward, windows_of

N_CTX, N_BATCH, N_SEQ, N_EMBD, N_VOCAB = 64, 32, 3, 576, 49_152
TOKENS = np.random.default_rng(1).integers(100, 40_000, 64).astype(np.int32)


@pytest.fixture(scope="module")
def halves(smollm2_path: Path, windows_folder: Path) -> Iterator[list[LayerWindow]]:
    """SmolLM2 in two windows: tokens into the first, hidden states into the second."""
    sizes = {"n_ctx": N_CTX, "n_batch": N_BATCH, "n_seq": N_SEQ, "resident": False}
    windows = windows_of(read_header(smollm2_path), (15,), windows_folder, **sizes)
    yield windows
    for window in windows:
        window.close()


@pytest.fixture
def first(halves: list[LayerWindow]) -> LayerWindow:
    empty(halves)
    return halves[0]


@pytest.fixture
def last(halves: list[LayerWindow]) -> LayerWindow:
    empty(halves)
    return halves[1]


def empty(windows: list[LayerWindow]) -> None:
    for window in windows:
        window.edit([Remove(sequence) for sequence in range(N_SEQ)])


def ints(*values: int) -> Ints:
    return np.array(values, np.int32)


def still_works(window: LayerWindow) -> None:
    """An answer of the right shape, and of numbers."""
    window.edit([Remove(sequence) for sequence in range(N_SEQ)])
    rows = ints(5, 6) if window.takes_tokens else np.zeros((2, N_EMBD), np.float32)
    out = window.forward(rows, ints(0, 1), ints(0, 0), np.array([False, True]))
    assert out.shape == ((2, N_EMBD) if window.takes_tokens else (1, N_VOCAB))
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("tokens", "positions", "sequences", "wanted", "reason"),
    [
        (ints(1, 2), ints(0, 64), ints(0, 0), ints(0, 1), "a position is outside the context"),
        (ints(1), ints(-1), ints(0), ints(1), "a position is outside the context"),
        (ints(1), ints(2**31 - 1), ints(0), ints(1), "a position is outside the context"),
        (ints(1), ints(0), ints(-1), ints(1), "a sequence is outside"),
        (ints(1), ints(0), ints(3), ints(1), "a sequence is outside"),
        (ints(1, 2), ints(0, 0), ints(0, 2), ints(1, 1), "a batch of several sequences must have"),
        (ints(1, 2), ints(0, 0), ints(1, 0), ints(1, 1), "a batch of several sequences must have"),
        (ints(1, 2, 3), ints(0, 1, 0), ints(0, 0, 1), ints(1, 1, 1), "a batch of several sequences must have"),
        (ints(-1), ints(0), ints(0), ints(1), "a token is outside the vocabulary"),
        (ints(5, N_VOCAB), ints(0, 1), ints(0, 0), ints(0, 1), "a token is outside the vocabulary"),
        (ints(), ints(), ints(), ints(), "the batch does not fit"),
        (TOKENS[:33], np.arange(33), np.zeros(33), np.ones(33), "the batch does not fit"),
        (ints(1, 2), ints(0), ints(0), ints(1), "this window takes tokens, one for each position"),
        (ints(1), ints(0, 1), ints(0, 0), ints(0, 1), "this window takes tokens, one for each position"),
        (ints(1, 2), ints(0, 1), ints(0), ints(0, 1), "the batch does not fit"),
        (ints(1, 2), ints(0, 1), ints(0, 0), ints(1), "the batch does not fit"),
        (np.zeros((1, N_EMBD), np.float32), ints(0), ints(0), ints(1), "this window takes tokens"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    tokens: Ints, positions: Ints, sequences: Ints, wanted: Ints, reason: str, first: LayerWindow
) -> None:
    with pytest.raises(HomeinferError, match=f"^layers 0 to 14: {reason}"):
        first.forward(tokens, positions, sequences, wanted.astype(np.bool_))
    still_works(first)


@pytest.mark.parametrize("rows", [ints(1), np.zeros((1, N_EMBD - 1), np.float32), np.zeros((2, N_EMBD), np.float32)])
def test_hidden_states_of_another_size_are_refused(rows: Ints | Floats, last: LayerWindow) -> None:
    with pytest.raises(HomeinferError, match=r"^layers 15 to 29: this window takes hidden states"):
        last.forward(rows, ints(0), ints(0), np.array([True]))
    still_works(last)


@pytest.mark.parametrize(
    ("n", "index", "rows"), [(-1, b"", b""), (1 << 30, b"", b""), (1, b"123", bytes(4)), (1, bytes(9), b"")]
)
def test_bytes_that_do_not_fit_are_refused(n: int, index: bytes, rows: bytes, first: LayerWindow) -> None:
    with pytest.raises(HomeinferError):
        first.forward_bytes(n, index, rows)
    still_works(first)


def test_a_position_that_leaves_a_gap_is_refused(first: LayerWindow) -> None:
    first.forward(ints(1, 2), ints(0, 1), ints(0, 0), np.array([False, True]))
    with pytest.raises(HomeinferError, match="llama_decode failed"):
        first.forward(ints(3), ints(7), ints(0), np.array([True]))
    still_works(first)


@pytest.mark.parametrize(
    "edit",
    [
        Remove(-1),
        Remove(N_SEQ),
        Remove(300),
        Remove(0, -2),
        Remove(0, 0, 1 << 40),
        Keep(999),
        Keep(-1),
        Copy(0, 300),
        Copy(-5, 0),
        Shift(300, 0, -1, 1),
        Shift(0, 0, -1, 1 << 31),
    ],
    ids=repr,
)
def test_an_edit_outside_the_memory_is_refused(edit: KvEdit, first: LayerWindow) -> None:
    with pytest.raises(HomeinferError, match=r"^a change of "):
        first.edit([Remove(0), edit])
    still_works(first)


def test_neighbouring_sequences_in_one_batch_are_exactly_as_if_alone(halves: list[LayerWindow]) -> None:
    def begun(sequence: int, n: int) -> None:
        tokens, positions = TOKENS[:n] + sequence, np.arange(n, dtype=np.int32)
        forward(halves, Batch(tokens, positions, np.full(n, sequence, np.int32), np.zeros(n, np.bool_)))

    sequences, positions = ints(0, 1, 2), ints(5, 3, 1)
    empty(halves)
    for sequence, n in enumerate(positions):
        begun(sequence, n)
    together = forward(halves, Batch(TOKENS[10:13], positions, sequences, np.ones(3, np.bool_)))
    assert together.shape == (3, N_VOCAB)
    for i, n in enumerate(positions):
        empty(halves)
        begun(i, n)
        one = Batch(TOKENS[10 + i : 11 + i], positions[i : i + 1], sequences[i : i + 1], np.ones(1, np.bool_))
        assert np.array_equal(forward(halves, one)[0], together[i])


def test_only_wanted_rows_come_back(halves: list[LayerWindow]) -> None:
    empty(halves)
    positions, sequences = np.arange(4, dtype=np.int32), np.zeros(4, np.int32)
    every = forward(halves, Batch(TOKENS[:4], positions, sequences, np.ones(4, np.bool_)))
    empty(halves)
    some = forward(halves, Batch(TOKENS[:4], positions, sequences, np.array([False, True, False, True])))
    assert np.array_equal(some, every[[1, 3]])


def test_a_closed_window_says_so(smollm2_path: Path) -> None:
    window = LayerWindow(WindowSpec(str(smollm2_path), 0, 30, 30, N_CTX, N_EMBD, resident=False))
    window.close()
    window.close()
    with pytest.raises(HomeinferError, match="the window is closed"):
        window.forward(ints(1), ints(0), ints(0), np.array([True]))


@pytest.mark.parametrize("content", [b"", b"no model at all\n" * 100, b"GGUF" + bytes(100)])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "window.gguf"
    path.write_bytes(content)
    with pytest.raises(HomeinferError, match=rf"^{path} can't be loaded: [^\n]+$"):
        LayerWindow(WindowSpec(str(path), 0, 1, 2, N_CTX, N_EMBD))
