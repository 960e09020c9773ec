"""Shadow windows: of the right layers, complete, valid, and solved back to single layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from homeinfer.cluster.planning.kinds import layer_kinds
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.profiling.kind_times import Steps, layer_times, left_out, output_times, window_cost
from homeinfer.profiling.shadow import Experts, Sizes, experts_of, output_shadow, shadows, solve_kinds
from homeinfer.profiling.timer import Timer, timer
from homeinfer.profiling.window_times import Bench, Patience
from tests.support.tiny_models import make_tiny_model

SMALL = Sizes(enough=1_000_000, experts=1 << 40, most=1 << 40)


@pytest.fixture(scope="module")
def process() -> Iterator[Timer]:
    with timer("a tiny model") as made:
        yield made


def tiny(arch: str, folder: Path) -> Header:
    path = folder / f"{arch}.gguf"
    make_tiny_model(arch, path)
    return read_header(path)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen2moe", "deepseek2", "jamba", "qwen3next", "llama4", "mamba2"])
def test_every_kind_of_an_architecture_is_in_a_window_that_llama_cpp_runs(
    arch: str, tmp_path: Path, process: Timer
) -> None:
    header = tiny(arch, tmp_path)
    bench = Bench(process, tmp_path, 1, 1 << 16, Patience(0.0))
    made = shadows(header, SMALL)
    assert {kind for shadow in made for kind in shadow.kinds} == set(layer_kinds(header))
    for shadow in made:
        assert len(shadow.kinds) == shadow.plan.last - shadow.plan.first
        with bench.written(shadow) as path:
            timed = bench.time(shadow, path, "mapped", 0.0, prefill=64)
        assert timed.is_finite
        assert min(timed.decode_1) > 0
        assert min(timed.prefill) > 0
    assert not list(tmp_path.glob("shadow*"))


def test_the_output_matrix_is_timed_in_part_where_there_is_little_room(gemma_path: Path) -> None:
    header = read_header(gemma_path)
    whole, all_rows = output_shadow(header, 1 << 40)
    part, rows = output_shadow(header, 20_000_000)
    assert all_rows == 1.0
    assert 0 < rows < 1
    assert part.nbytes < whole.nbytes
    steps = Steps(1.0, 2.0, 3.0), Steps(5.0, 10.0, 3.0)
    times = output_times(header, *steps, 0.5, "resident")
    assert (times.decode_1_ms, times.decode_8_ms, times.prefill_512_ms) == (8.0, 16.0, 8.0)


def test_layers_that_are_larger_than_the_room_are_refused_in_one_line(smollm2_path: Path) -> None:
    with pytest.raises(HomeinferError, match=r"layer \d+ takes .* MB to be timed, and for that 1 MB .* are free"):
        shadows(read_header(smollm2_path), Sizes(0, 0, 1_000_000))


def test_a_shadow_has_no_more_experts_than_asked_for_and_no_fewer_than_a_token_uses(tmp_path: Path) -> None:
    header = tiny("qwen2moe", tmp_path)
    every = experts_of(header, 1 << 40)
    fewest = experts_of(header, 1)
    assert every is not None
    assert fewest is not None
    assert every.kept == every.count
    assert fewest.kept == fewest.used < fewest.count
    small, large = shadows(header, Sizes(0, 1, 1 << 40)), shadows(header, Sizes(0, 1 << 40, 1 << 40))
    assert small[0].nbytes < large[0].nbytes


def test_times_of_kinds_follow_from_windows_that_mix_them() -> None:
    true = {"a": 2.0, "b": 5.0}
    windows = [["a"], ["a", "b"], ["b", "a", "a"]]
    solved = solve_kinds(windows, [sum(true[k] for k in w) for w in windows], {"a": 1e6, "b": 1e6})
    assert solved == pytest.approx(true)


def test_kinds_that_only_come_together_share_a_time_as_they_share_bytes() -> None:
    assert solve_kinds([["a", "b"]], [6.0], {"a": 1e6, "b": 2e6}) == pytest.approx({"a": 2.0, "b": 4.0})


def test_what_a_window_costs_is_taken_off_but_never_more_than_half(smollm2_path: Path) -> None:
    assert window_cost(Steps(0.3, 0, 0), Steps(1.1, 0, 0), 9) == pytest.approx(0.2)
    header = read_header(smollm2_path)
    made = shadows(header, Sizes(0, 0, 1 << 40))
    steps = [Steps(1.0, 2.0, 100.0)] * len(made)
    calm = layer_times(header, made, steps, Steps(0.2, 0.2, 0.2), None, "resident")
    wild = layer_times(header, made, steps, Steps(9.0, 9.0, 9.0), None, "resident")
    assert all(times.decode_1_ms == pytest.approx(0.8) for times in calm)
    assert all(times.decode_1_ms == pytest.approx(0.5) for times in wild)
    disturbed = layer_times(header, made, [Steps(3.0, 2.0, 100.0)] * len(made), Steps(0, 0, 0), None, "resident")
    assert all(times.decode_8_ms == times.decode_1_ms == pytest.approx(3.0) for times in disturbed)


def test_eight_tokens_reach_more_experts_than_a_smaller_shadow_has() -> None:
    assert left_out(Experts(256, 8, 256), 8) == 0
    assert left_out(Experts(256, 8, 16), 1) == pytest.approx(0)
    assert 30 < left_out(Experts(256, 8, 16), 8) < 48
    assert left_out(None, 8) == 0
