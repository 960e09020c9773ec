"""What a step reads of an output matrix that is streamed, and tokens would be looked up in."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest

from homeinfer.engine import streaming
from homeinfer.engine.streaming import Streamer
from homeinfer.engine.window import LayerWindow
from homeinfer.model.header import read_header
from tests.support.windows import windows_of

N_EMBD = 576
BUFFER = 36 << 20
"""Holds the matrix of 30 MB and little else, or the ten layers before it."""


def settled(streamer: Streamer) -> int:
    """Bytes read so far, when nothing is read any more."""
    before, now = -1, streamer.counts().read_bytes
    while before < now:
        time.sleep(0.1)
        before, now = now, streamer.counts().read_bytes
    return now


@pytest.mark.parametrize("in_blocks", [True, False])
def test_it_is_read_once_for_a_token_and_never_for_rows_without_logits(
    smollm2_path: Path, windows_folder: Path, monkeypatch: pytest.MonkeyPatch, in_blocks: bool
) -> None:
    if not in_blocks:
        monkeypatch.setattr(streaming, "block_rows", lambda _: 0)
    first, last = windows_of(read_header(smollm2_path), (20,), windows_folder, resident=False, n_seq=1, n_ctx=128)
    for window in (first, last):
        window.close()
    streamer = Streamer(BUFFER)
    random = np.random.default_rng(0)
    with contextlib.closing(LayerWindow(last.spec, streamer=streamer)) as window:
        streamer.start()
        position = 0

        def read(n: int, *, wanted: bool) -> int:
            nonlocal position
            before = settled(streamer)
            rows = random.normal(size=(n, N_EMBD)).astype(np.float32)
            positions = np.arange(position, position + n, dtype=np.int32)
            window.forward(rows, positions, np.zeros(n, np.int32), np.full(n, wanted))
            position += n
            return settled(streamer) - before

        chunks = [read(16, wanted=False) for _ in range(4)]
        tokens = [read(1, wanted=True) for _ in range(5)]
    # the least: a disk that stalled has only seemed to be done
    assert min(chunks[2:]) == 0
    assert 0 < min(tokens[2:]) < 1.2 * streamer.streamed_bytes  # the matrix twice: 1.5
