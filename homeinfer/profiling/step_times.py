"""Time the steps of a loaded window as a ring asks for them: after a pause, with the weights out of the caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import psutil

from homeinfer.engine.edits import Remove
from homeinfer.engine.pipeline import Floats
from homeinfer.engine.streaming import SUPPORTED, Streamer
from homeinfer.engine.window import LayerWindow
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.memory import give_back
from homeinfer.profiling.slices import Slices
from homeinfer.profiling.timing_messages import Timed, TimeWindow

PREFILL = 512
_SEVERAL = 8
_N_CTX = PREFILL + 64
_SHORTEST_PREFILL = 64
_DECODE_SHARE = 0.5
_SLICE_SECONDS = 0.15
_LEAST_SLICES = 2


def step_times(request: TimeWindow) -> Timed:
    """Load the window, run it. Raises HomeinferError when llama.cpp can't load it or has no memory for it."""
    # as a streamed window runs, with a buffer that holds all of it: what remains is computing
    streamer = Streamer(2 * request.nbytes) if request.place == "mapped" and SUPPORTED else None
    flush = CacheFlush(request.flush_bytes, request.n_threads)
    try:
        window = LayerWindow(window_spec(request), streamer=streamer)
        try:
            if streamer is not None:
                streamer.start()
            return _Steps(window, request, flush).run()
        finally:
            if streamer is not None:
                streamer.close()
            window.close()
    finally:
        flush.close()


def window_spec(request: TimeWindow) -> WindowSpec:
    """How the window is loaded."""
    return msgspec.structs.replace(
        middle_spec(request.path, request.layers, request.n_embd, request.n_threads),
        n_layer=1 + request.layers + (not request.is_last),
        n_ctx=request.position + _N_CTX,
        resident=request.place != "mapped",
        gpu_layers=-1 if request.place == "gpu" else 0,
        gpu=request.gpu if request.place == "gpu" else None,
        n_batch=max(request.prefill_tokens, _SHORTEST_PREFILL if request.position else _SEVERAL),
    )


def middle_spec(path: str, layers: int, n_embd: int, n_threads: int) -> WindowSpec:
    """A window in the middle of a model, mapped, in small batches: hidden states go in and come out."""
    last = 1 + layers
    return WindowSpec(
        path=path,
        first=1,
        last=last,
        n_layer=last + 1,
        n_ctx=256,
        embedding_length=n_embd,
        resident=False,
        n_batch=_SEVERAL,
        n_threads=n_threads,
    )


class CacheFlush:
    """Reads memory of its own with all threads, so that nothing else stays in the processor's caches."""

    def __init__(self, nbytes: int, n_threads: int) -> None:
        self._parts = np.array_split(np.ones(max(nbytes // 8, n_threads), np.uint64), n_threads)
        self._pool = ThreadPoolExecutor(n_threads)

    def __call__(self) -> None:
        list(self._pool.map(np.add.reduce, self._parts))

    def close(self) -> None:
        self._pool.shutdown()


class _Steps:
    def __init__(self, window: LayerWindow, request: TimeWindow, flush: Callable[[], None]) -> None:
        self._window, self._request, self._flush = window, request, flush
        self._rows = rows(PREFILL, request.n_embd)
        self._position = 0
        self._finite = True

    def run(self) -> Timed:
        """Single tokens and eight of them take turns, so that a disturbance meets both alike."""
        request = self._request
        self._go_to(request.position)
        for n in (1, _SEVERAL, 1):
            self._step(n)
        share = _DECODE_SHARE if request.prefill_tokens else 1.0
        decoding = Slices(share * request.seconds, share * request.patience, least=_LEAST_SLICES)
        while decoding.goes_on():
            decoding.add(self._decode_slice)
        tokens, prefills = PREFILL, Slices(0.0, 0.0, least=0)
        if request.prefill_tokens:
            left = (1 - share) * request.seconds
            tokens = self._prompt_tokens(left)
            prefills = Slices(left, (1 - share) * request.patience, least=1)
            while prefills.goes_on():
                prefills.add(lambda: ([self._step(tokens)], []))
        ones, eights = decoding.best()
        return Timed(
            decode_1=tuple(ones),
            decode_8=tuple(eights),
            prefill=tuple(prefills.best()[0]),
            prefill_tokens=tokens,
            is_finite=self._finite,
            is_disturbed=decoding.is_disturbed or prefills.is_disturbed,
            extra_seconds=decoding.extra_seconds + prefills.extra_seconds,
            private_bytes=private_bytes() - request.flush_bytes,
        )

    def _decode_slice(self) -> tuple[list[float], list[float]]:
        """Some steps, long enough for the system's clock of processor time to see who else was busy."""
        ones: list[float] = []
        eights: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < _SLICE_SECONDS:
            ones += [self._step(1) for _ in range(3)]
            eights.append(self._step(_SEVERAL))
        return ones, eights

    def _prompt_tokens(self, seconds: float) -> int:
        """512, or fewer where a prompt of so many would take longer than there is time."""
        probe = self._step(_SHORTEST_PREFILL) * 1e-3
        tokens = _SHORTEST_PREFILL
        while tokens < self._request.prefill_tokens and probe * 2 * tokens / _SHORTEST_PREFILL < max(seconds, 0.1):
            tokens *= 2
        return tokens

    def _go_to(self, position: int) -> None:
        """Forget everything, then take in so many tokens."""
        self._window.edit([Remove(0, -1, -1)])
        self._position = 0
        while self._position < position:
            self._run(min(self._window.spec.n_batch, position - self._position))

    def _step(self, n: int) -> float:
        """Milliseconds of n tokens."""
        if n >= _SHORTEST_PREFILL or self._position + n > self._window.spec.n_ctx:
            self._go_to(0 if n >= _SHORTEST_PREFILL else self._request.position)
        return self._run(n)

    def _run(self, n: int) -> float:
        positions = np.arange(self._position, self._position + n, dtype=np.int32)
        wanted = np.ones(n, np.bool_)
        if n >= _SHORTEST_PREFILL:
            wanted[:-1] = not self._window.is_last
        index = positions.tobytes() + np.zeros(n, np.int32).tobytes() + wanted.tobytes()
        self._position += n
        self._flush()
        begin = time.perf_counter()
        out = self._window.forward_bytes(n, index, self._rows[:n])
        took = (time.perf_counter() - begin) * 1e3
        self._finite = self._finite and bool(np.isfinite(np.frombuffer(out, np.float32)).all())
        return took


def rows(n: int, n_embd: int) -> Floats:
    """Hidden states, float32 [n, n_embd], of about the size that a model's are. (numpy.random would add to
    `private_bytes` what no engine has.)"""
    return np.sin(np.arange(n * n_embd, dtype=np.float32) ** 2).reshape(n, n_embd)


def private_bytes() -> int:
    """Memory that this process takes (its share of what it has in common with others, where the system says it)."""
    give_back()
    memory = psutil.Process().memory_full_info()
    return int(getattr(memory, "pss", 0) or memory.uss)
