"""A plan's GPU comes through to the engine: how it is passed on, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from homeinfer.cluster.agent_worker import window_specs
from homeinfer.cluster.local import RingOptions
from homeinfer.cluster.planned import device_windows
from homeinfer.cluster.planning.plan import Ring, Window
from homeinfer.cluster.wire.control import EngineOptions, WindowRun
from homeinfer.engine.gpus import gpu_devices
from homeinfer.engine.window import LayerWindow
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.model.window_plan import n_layers
from homeinfer.profiling.step_times import window_spec
from homeinfer.profiling.timing_messages import TimeWindow
from tests.support.scripted_head import tiny_model

PLACES = [("r", (0, None)), ("s", (0, None)), ("g", (-1, 3))]


@pytest.mark.parametrize(("place", "expected"), PLACES)
def test_an_agent_loads_layers_on_the_gpu_that_the_plan_names(
    tmp_path: Path, place: str, expected: tuple[int, int | None]
) -> None:
    header = read_header(tiny_model(tmp_path / "model"))
    runs = (WindowRun(0, 1, "r"), WindowRun(1, 2, place, 3))  # type: ignore[arg-type]
    _, spec = window_specs(header, runs, [tmp_path, tmp_path], EngineOptions(64, 32, 1), 1)
    assert (spec.gpu_layers, spec.gpu) == expected


@pytest.mark.parametrize(("place", "expected"), PLACES)
def test_a_planned_ring_loads_layers_on_the_gpu_that_the_plan_names(
    tmp_path: Path, place: str, expected: tuple[int, int | None]
) -> None:
    header = read_header(tiny_model(tmp_path / "model"))
    n = n_layers(header)
    ring = Ring((Window("desk", 0, n - 1, "r" * (n - 1)), Window("desk", n - 1, n, place, 3)))
    _, spec = device_windows(header, ring, "desk", RingOptions(n_ctx=64, n_threads=1), tmp_path)
    assert (spec.gpu_layers, spec.gpu) == expected


def test_layers_are_timed_on_the_gpu_that_is_asked_for() -> None:
    request = TimeWindow(
        "w.gguf", 1, 64, 1000, is_last=False, place="gpu", n_threads=1, flush_bytes=0, seconds=1, gpu=1
    )
    assert (window_spec(request).gpu_layers, window_spec(request).gpu) == (-1, 1)


def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    header = read_header(tiny_model(tmp_path / "model"))
    missing = len(gpu_devices())
    run = WindowRun(0, n_layers(header), "g", missing)
    (spec,) = window_specs(header, (run,), [Path(header.files[0].path)], EngineOptions(64, 32, 1), 1)
    with pytest.raises(HomeinferError, match=f"on GPU {missing}, and this device has {missing}:"):
        LayerWindow(spec)
