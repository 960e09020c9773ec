"""A window of Gemma's layers that all see the last tokens only: llama.cpp would end the process if it moved positions
in its memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from homeinfer.cluster.local import RingOptions, window_specs
from homeinfer.engine.edits import Shift
from homeinfer.engine.window import LayerWindow
from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import can_shift
from homeinfer.model.header import read_header
from tests.support.async_ring import async_ring, greedy

OPTIONS = RingOptions(n_ctx=64, n_batch=32, n_threads=1)


def test_only_windows_with_a_layer_that_sees_everything_can_shift(gemma_path: Path) -> None:
    header = read_header(gemma_path)
    windows = [(0, 5), (5, 6), (6, 11), (6, 12), (14, 15), (17, 18), (0, 18)]
    assert [can_shift(header, *edges) for edges in windows] == [False, True, False, True, False, True, True]


def test_a_shift_there_is_refused(gemma_path: Path) -> None:
    spec = window_specs(read_header(gemma_path), [(0, 6), (6, 11), (11, 18)], OPTIONS)[1]
    window = LayerWindow(spec)
    try:
        with pytest.raises(HomeinferError, match="can't be shifted"):
            window.edit([Shift(0, 4, 8, -4)])
    finally:
        window.close()


def test_an_answer_that_fills_the_context_of_such_a_ring_ends_and_the_next_one_comes(gemma_path: Path) -> None:
    header = read_header(gemma_path)

    async def run() -> None:
        async with async_ring(header, [[(0, 6), (11, 18)], [(6, 11)]], OPTIONS) as ring:
            ring.client.retarget(
                ring.epoch, ring.peers[0], can_shift=all(e.ready.can_shift for e in ring.engines if e.ready)
            )
            tokens, finish = await ring.answer([5, 6, 7], greedy(200))
            assert finish.reason == "length"
            assert len(tokens) > 50
            assert len((await ring.answer([5, 6, 7], greedy(4)))[0]) == 4

    asyncio.run(run())
