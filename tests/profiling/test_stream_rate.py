"""How fast layers can be streamed, measured by streaming a real model's."""

from __future__ import annotations

from pathlib import Path

from homeinfer import folders
from homeinfer.engine.streaming import SUPPORTED
from homeinfer.model.header import read_header
from homeinfer.model.window_file import cut_windows
from homeinfer.profiling.stream_rate import stream_rate
from homeinfer.profiling.timing_messages import TimeStream


def rate_of(model: Path, first: int, last: int) -> float:
    header = read_header(model)
    (path,) = cut_windows(header, ((first, last),), folders.windows_folder())
    return stream_rate(TimeStream(str(path), last - first, int(header.arch_get("embedding_length")), 1, 0.3))


def test_a_window_larger_than_the_buffer_gives_a_rate(smollm2_path: Path) -> None:
    assert not SUPPORTED or 1e6 < rate_of(smollm2_path, 1, 29) < 1e12


def test_layers_that_fit_give_none(smollm2_path: Path) -> None:
    assert rate_of(smollm2_path, 1, 2) == 0
