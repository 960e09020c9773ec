"""A profile of this very machine, in short: with real disk, memory and processes."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from homeinfer.cluster.planning.kinds import layer_kinds, output_kind
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.profiling import disk, measure, model_times
from homeinfer.profiling.cache import Cache
from homeinfer.profiling.disk import measure_disk
from homeinfer.profiling.machine import this_machine, usable_memory
from homeinfer.profiling.measure import ProfileOptions, measure_profile, work_folder
from homeinfer.profiling.slices import Slices
from homeinfer.profiling.timer import timer
from homeinfer.profiling.timing_messages import TimeWindow


@pytest.fixture(scope="module")
def short() -> Iterator[pytest.MonkeyPatch]:
    """Measure for moments only: what is found is right, if not steady."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "_SECONDS", 0.05)
        patch.setattr(disk, "_MOST_BYTES", 64 << 20)
        patch.setattr(disk, "_PASS", 16 << 20)
        patch.setattr(disk, "_STREAMED", 4 << 20)
        patch.setattr(model_times, "_SECONDS", 0.0)
        patch.setattr(model_times, "_ENOUGH", 8_000_000)
        patch.setattr(measure, "_MODEL_SECONDS", 0.0)
        patch.setattr(measure, "_BASE_PATIENCE", 0.0)
        yield patch


@pytest.fixture(scope="module")
def header(smollm2_path: Path) -> Header:
    return read_header(smollm2_path)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, float, float]]:
    return []


@pytest.fixture(scope="module")
def profile(
    short: pytest.MonkeyPatch,
    header: Header,
    told: list[tuple[str, float, float]],
    tmp_path_factory: pytest.TempPathFactory,
) -> DeviceProfile:
    short.setenv("HOMEINFER_PROFILES", str(tmp_path_factory.mktemp("profiles")))
    return measure_profile(header, ProfileOptions(name="desk", n_threads=1), lambda *said: told.append(said))


def test_a_profile_has_times_for_every_kind_of_layer_in_every_place(profile: DeviceProfile, header: Header) -> None:
    expected = {
        (kind, place) for kind in (*layer_kinds(header), output_kind(header)) for place in ("resident", "mapped")
    }
    assert {(times.kind, times.place) for times in profile.times if times.place != "gpu"} == expected
    for times in profile.times:
        assert 0 < times.decode_1_ms <= times.decode_8_ms
        assert math.isfinite(times.prefill_512_ms)


def test_a_profile_tells_what_the_device_is(profile: DeviceProfile) -> None:
    assert (profile.name, profile.threads) == ("desk", 1)
    assert 1 <= profile.cores <= (os.cpu_count() or 1)
    assert 0 < profile.memory_bytes <= psutil.virtual_memory().total
    assert 1e8 < profile.memory_bytes_per_s < 1e13
    assert 20e6 < profile.overhead_bytes < 400e6
    assert 0 <= profile.window_ms < 100
    assert 0 < profile.hop_ms < 100
    assert profile.attention_macs_per_s > 0
    assert profile.disk.fault_bytes_per_s <= profile.disk.layer_bytes_per_s
    assert profile.cpu
    assert profile.system


def test_progress_goes_forward_and_says_what_is_measured(
    profile: DeviceProfile, told: list[tuple[str, float, float]]
) -> None:
    assert profile.times
    shares = [share for _, share, _ in told]
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert 0.8 < shares[-1] <= 1
    assert {"disk", "memory"} < {what for what, _, _ in told}
    assert any("layers" in what and "streamed" in what for what, _, _ in told)


def test_what_was_measured_is_not_measured_again_but_free_memory_and_disk_are(
    profile: DeviceProfile, header: Header
) -> None:
    again_told: list[str] = []
    again = measure_profile(header, ProfileOptions(n_threads=1), lambda what, _share, _left: again_told.append(what))
    assert again_told == []
    assert again.times == profile.times
    assert again.disk.layer_bytes_per_s == profile.disk.layer_bytes_per_s
    assert again.name != "desk"
    plain = measure_profile(None, ProfileOptions(n_threads=1))
    assert plain.times == ()
    assert plain.window_ms == profile.window_ms


def test_what_was_measured_serves_where_memory_is_too_short_to_measure_it(
    profile: DeviceProfile, header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise HomeinferError("too little memory")

    monkeypatch.setattr(measure, "timing_plan", refuse)
    assert measure_profile(header, ProfileOptions(n_threads=1)).times == profile.times


def test_another_number_of_threads_is_another_measurement(profile: DeviceProfile, tmp_path: Path) -> None:
    one, two = (Cache(this_machine(), n, tmp_path) for n in (1, 2))
    one.put("disk", profile.disk)
    assert one.get("disk", type(profile.disk)) == profile.disk
    assert two.get("disk", type(profile.disk)) is None
    assert Cache(this_machine(), 1, tmp_path, fresh=True).get("disk", type(profile.disk)) is None
    next(tmp_path.glob("*.json")).write_bytes(b"{")
    assert one.get("disk", type(profile.disk)) is None


def test_nothing_stays_of_a_profile_nor_of_one_that_was_killed(profile: DeviceProfile, windows_folder: Path) -> None:
    assert profile.times
    assert not list(windows_folder.glob(".profile-*"))
    left = windows_folder / ".profile-99999999-x"
    left.mkdir()
    with work_folder(windows_folder):
        assert not left.exists()


def test_a_disk_is_read_from_the_model_when_it_is_large_enough_and_else_from_a_temporary_file(
    short: pytest.MonkeyPatch, smollm2_path: Path, tmp_path: Path
) -> None:
    assert short
    for model in (smollm2_path, None):
        found = measure_disk(tmp_path, model, n_threads=2)
        assert found.sequential_bytes_per_s > 1e6
        assert found.free_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_a_timer_that_is_killed_and_a_file_that_is_no_window_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    request = TimeWindow(str(broken), 1, 64, 1000, False, "resident", 1, 1 << 16, 0.1)
    with timer("model.gguf") as process:
        with pytest.raises(HomeinferError, match=r"broken\.gguf"):
            process.time(request)
        assert isinstance(process.gpus(), tuple)
        psutil.Process(process.pid).kill()
        with pytest.raises(HomeinferError, match=r"model\.gguf: the process that times layers was killed"):
            process.time(request)


def test_disturbed_slices_do_not_count_while_there_are_quiet_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.9, 0.0, 0.9, 0.0])
    monkeypatch.setattr("homeinfer.profiling.slices.OthersWatch.share", lambda _self: next(shares))
    slices = Slices(0.0, 60.0, least=2)
    numbers = itertools.count(1)
    while slices.goes_on():
        slices.add(lambda: ([float(next(numbers))], []))
    assert slices.best() == ([2.0, 4.0], [])
    assert not slices.is_disturbed


def test_usable_memory_is_not_more_than_the_system_has() -> None:
    assert 0 < usable_memory() <= psutil.virtual_memory().total
