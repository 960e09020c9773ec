"""Gemma 3 270M, a real model with sliding windows and tied embeddings: windows at every cut give its logits."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from homeinfer.engine import runtime
from homeinfer.engine.edits import Remove
from homeinfer.engine.pipeline import Batch, Floats
from homeinfer.engine.window import LayerWindow
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_plan import n_layers
from tests.support.windows import forward, windows_of

N_LAYERS, CHUNK = 18, 512
TOKENS = np.random.default_rng(7).integers(1000, 200_000, 600).tolist()
NEAR, FAR = 40, len(TOKENS) - 8
"""Tokens of the prompts. A layer that is taken for one of the other kind (each sixth sees everything, and turns its
keys by another angle per position) gives other logits at once. The long prompt is longer than what the others see
(512): its second chunk and what is decoded forget its start."""
FAR_CUTS = (1, 5, 6, 11, 17)
"""Cuts for the long prompt: a window of one layer at either end, windows without a layer that sees everything and
without any other, and some that begin with one or just after."""
SIZES = {"n_ctx": 640, "n_batch": CHUNK, "n_threads": 1, "resident": False}


@pytest.fixture(scope="module")
def gemma(gemma_path: Path) -> Header:
    return read_header(gemma_path)


def logits(windows: Sequence[LayerWindow], prompt: int) -> Floats:
    """After each chunk of a prompt and each of 8 tokens more: float32 [chunks + 8, n_vocab]."""
    for window in windows:
        window.edit([Remove(0)])
    edges = [*range(0, prompt, CHUNK), *range(prompt, prompt + 9)]
    return np.stack([forward(windows, Batch.of(TOKENS[a:b], a))[0] for a, b in itertools.pairwise(edges)])


def all_logits(windows: Sequence[LayerWindow], prompts: Sequence[int]) -> list[Floats]:
    """Of each prompt; the windows are closed then."""
    try:
        return [logits(windows, prompt) for prompt in prompts]
    finally:
        for window in windows:
            window.close()


@pytest.fixture(scope="module")
def found(gemma: Header, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Future[list[Floats]]]]:
    """The logits by cut, without any at 0, two at a time: each uses one core."""
    assert n_layers(gemma) == N_LAYERS

    def at(cut: int) -> list[Floats]:
        folder = tmp_path_factory.mktemp(f"cut{cut}")
        prompts = (NEAR, FAR) if cut in (0, *FAR_CUTS) else (NEAR,)
        try:
            return all_logits(windows_of(gemma, (cut,) if cut else (), folder, **SIZES), prompts)
        finally:
            shutil.rmtree(folder)

    runtime.llama()  # loaded by one thread
    with ThreadPoolExecutor(2) as pool:
        yield {cut: pool.submit(at, cut) for cut in range(N_LAYERS)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cut", range(1, N_LAYERS))
def test_two_windows_of_gemma_give_its_logits_bit_by_bit(cut: int, found: dict[int, Future[list[Floats]]]) -> None:
    expected, got = found[0].result(), found[cut].result()
    assert len(got) == 1 + (cut in FAR_CUTS)
    assert [np.array_equal(one, whole) for one, whole in zip(got, expected, strict=False)] == [True] * len(got)
