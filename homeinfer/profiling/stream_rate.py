"""How fast weights come from disk while layers are streamed: by streaming layers."""

from __future__ import annotations

import time

import numpy as np

from homeinfer.engine.streaming import SUPPORTED, Streamer
from homeinfer.engine.window import LayerWindow
from homeinfer.profiling.step_times import middle_spec
from homeinfer.profiling.timing_messages import TimeStream

_AHEAD = 32 << 20
"""Room for reading while a layer computes."""


def stream_rate(request: TimeStream) -> float:
    """Bytes per second of a window that is streamed through as little memory as possible, after two tokens of warm-up
    (the same layers come again for each token: where something below caches, that is faster than the first time); 0
    where streaming is not supported or all layers fit. Raises HomeinferError when llama.cpp can't load it."""
    if not SUPPORTED:
        return 0.0
    streamer = Streamer(1 << 62)
    spec = middle_spec(request.path, request.layers, request.n_embd, request.n_threads)
    window = LayerWindow(spec, streamer=streamer)
    try:
        buffer = streamer.least_bytes + min(_AHEAD, streamer.streamed_bytes // 8)
        if 2 * buffer > streamer.streamed_bytes:
            return 0.0
        streamer.resize(buffer)
        streamer.start()
        return _rate(window, streamer, request.seconds)
    finally:
        streamer.close()
        window.close()


def _rate(window: LayerWindow, streamer: Streamer, seconds: float) -> float:
    row = np.random.default_rng(0).normal(0, 1, window.n_embd).astype(np.float32)
    begin, read = 0.0, 0
    for position in range(window.spec.n_ctx):
        if position == 2:
            begin, read = time.perf_counter(), streamer.counts().read_bytes
        index = np.array([position, 0], np.int32).tobytes() + b"\1"
        window.forward_bytes(1, index, row)
        if position > 3 and time.perf_counter() - begin > seconds:
            break
    return (streamer.counts().read_bytes - read) / (time.perf_counter() - begin)
