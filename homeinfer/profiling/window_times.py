"""Time shadow windows: write the file, have it filled and run, remove it."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from homeinfer.cluster.planning.profile import Place
from homeinfer.errors import HomeinferError
from homeinfer.folders import free_bytes
from homeinfer.model.header import Header
from homeinfer.model.window_file import write_window
from homeinfer.profiling.kind_times import spread, steady, steps_of, window_cost
from homeinfer.profiling.machine import usable_memory
from homeinfer.profiling.shadow import ATTENTION_MACS, Shadow, attention_shadow, thin_shadow
from homeinfer.profiling.step_times import PREFILL
from homeinfer.profiling.timer import Timer
from homeinfer.profiling.timing_messages import Timed, TimeStream, TimeWindow

_MOST_FLUSH = 256 << 20
_THIN_LAYERS = 9
_THIN_EMBEDDING = 1024
_SPARE_BYTES = 16 << 20
_LATE = 2048
_PADDING = 256
"""llama.cpp attends to a multiple of so many positions, also in the beginning."""


class WindowCosts(msgspec.Struct, frozen=True):
    """What a window costs a step by itself, what an engine process takes without weights, how steady it was."""

    window_ms: float
    overhead_bytes: int
    noise: float
    is_disturbed: bool
    attention_macs_per_s: float


class Patience(msgspec.Struct):
    """Seconds that may still be spent on waiting for others to be quiet."""

    seconds: float


class Bench(msgspec.Struct, frozen=True):
    """Where and how windows are timed."""

    process: Timer
    folder: Path
    n_threads: int
    cache_bytes: int
    patience: Patience

    @contextlib.contextmanager
    def written(self, shadow: Shadow) -> Iterator[Path]:
        """The shadow's file, for as long as it is needed. Raises HomeinferError without room for it."""
        needed, free = shadow.nbytes + _SPARE_BYTES, free_bytes(self.folder)
        if free < needed:
            raise HomeinferError(
                f"{self.folder.parent} has {free / 1e6:,.0f} MB free, and {needed / 1e6:,.0f} MB are needed to time a "
                "layer: make room there or set HOMEINFER_WINDOWS to another folder"
            )
        path = self.folder / "shadow.gguf"
        try:
            write_window(_NO_MODEL, shadow.plan, path)
            self.process.fill(path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def time(
        self,
        shadow: Shadow,
        path: Path,
        place: Place,
        seconds: float,
        *,
        gpu: int = 0,
        prefill: int = PREFILL,
        position: int = 0,
    ) -> Timed:
        """Steps of a shadow whose file is written."""
        found = self.process.time(
            TimeWindow(
                path=str(path),
                layers=shadow.plan.last - shadow.plan.first,
                n_embd=shadow.n_embd,
                nbytes=shadow.nbytes,
                is_last=shadow.is_last,
                place=place,
                n_threads=self.n_threads,
                flush_bytes=min(2 * self.cache_bytes, _MOST_FLUSH, max(usable_memory(), 0) // 16),
                seconds=seconds,
                gpu=gpu,
                prefill_tokens=prefill,
                position=position,
                patience=self.patience.seconds,
            )
        )
        self.patience.seconds = max(self.patience.seconds - found.extra_seconds, 0.0)
        return found

    def stream_rate(self, shadow: Shadow, path: Path, seconds: float) -> float:
        """Bytes per second at which a shadow whose file is written can be streamed; 0 where that can't be said."""
        layers = shadow.plan.last - shadow.plan.first
        return self.process.stream_rate(TimeStream(str(path), layers, shadow.n_embd, self.n_threads, seconds))


_NO_MODEL = Header(3, (), {}, ())


def window_costs(bench: Bench, on_progress: Callable[[float], None]) -> WindowCosts:
    """Time windows of layers that compute next to nothing, or attention alone."""
    timed = [_thin_times(bench, layers) for layers in (1, _THIN_LAYERS)]
    on_progress(0.4)
    cost = window_cost(steps_of(timed[0]), steps_of(timed[1]), _THIN_LAYERS)
    attention = _attention_rate(bench)
    on_progress(0.9)
    return WindowCosts(
        window_ms=cost,
        overhead_bytes=timed[0].private_bytes,
        noise=statistics.median(spread(t.decode_1) for t in timed),
        is_disturbed=any(t.is_disturbed for t in timed),
        attention_macs_per_s=attention,
    )


def _thin_times(bench: Bench, layers: int) -> Timed:
    shadow = thin_shadow(_THIN_EMBEDDING, layers)
    with bench.written(shadow) as path:
        return bench.time(shadow, path, "resident", 0.6, prefill=0)


def _attention_rate(bench: Bench) -> float:
    """Multiplications per second of attention: from how much longer a token takes behind many others."""
    shadow = attention_shadow()
    with bench.written(shadow) as path:
        early, late = (
            steady(bench.time(shadow, path, "resident", 0.6, prefill=0, position=position).decode_1)
            for position in (0, _LATE)
        )
    macs = ATTENTION_MACS * (shadow.plan.last - shadow.plan.first) * (_LATE - _PADDING)
    return macs / max(late - early, 1e-2) * 1e3
