"""`--fit` and `--tpot` by planning: the largest file that stays in memory, or that is quick enough."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from homeinfer.cli.main import main
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Workload
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.quick import has_plan
from homeinfer.cluster.planning.solve import solve
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.quant.budget import read_profiles, smallest_bytes, source_bytes
from homeinfer.quant.budget_plan import (
    _scaled_to,
    budget_in_memory,
    budget_of_tpot,
    predicted_tpot,
    references,
    with_types,
)
from tests.support.header_file import LLAMA_8B, write_header_file
from tests.support.profiles import MAC, PHONE, device_of, write_profile


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six of Llama 3 8B's layers in F16: 4.7 GB."""
    size = msgspec.structs.replace(LLAMA_8B, n_layer=6)
    return write_header_file(tmp_path_factory.mktemp("source") / "model-F16.gguf", size, "F16")


@pytest.fixture(scope="module")
def header(path: Path) -> Header:
    return read_header(path, allow_truncated=True)


@pytest.fixture(scope="module")
def devices(header: Header) -> tuple[DeviceProfile, ...]:
    shape = model_shape(header, Workload())
    return tuple(device_of(machine, shape) for machine in (MAC, PHONE))


def tpot_at(header: Header, devices: tuple[DeviceProfile, ...], size: int) -> float:
    return solve(_scaled_to(references(header, devices), header, size)).prediction.tpot_ms


def test_the_largest_file_that_stays_in_memory_does_and_a_larger_one_does_not(
    header: Header, devices: tuple[DeviceProfile, ...]
) -> None:
    budget = budget_in_memory(header, devices)
    found = references(header, devices)
    assert smallest_bytes(header) < budget.limit_bytes < sum(device.memory_bytes for device in devices)
    assert has_plan(_scaled_to(found, header, budget.limit_bytes), in_memory=True)
    assert not has_plan(_scaled_to(found, header, int(1.03 * budget.limit_bytes)), in_memory=True)
    assert "mac, phone" in budget.says


def test_the_largest_file_that_is_quick_enough_is_and_a_larger_one_is_not(
    header: Header, devices: tuple[DeviceProfile, ...]
) -> None:
    sizes = []
    for tpot_ms in (80.0, 900.0):
        size = budget_of_tpot(header, devices, tpot_ms).limit_bytes
        assert tpot_at(header, devices, size) <= tpot_ms < tpot_at(header, devices, int(1.05 * size))
        sizes.append(size)
    assert sizes == sorted(sizes)


def test_a_time_that_nothing_meets_is_said_with_the_least_and_a_generous_one_gives_the_source(
    header: Header, devices: tuple[DeviceProfile, ...]
) -> None:
    with pytest.raises(HomeinferError, match=r"--tpot 1: on mac, phone even the smallest file \([\d,]+ bytes\) takes"):
        budget_of_tpot(header, devices, 1.0)
    assert budget_of_tpot(header, devices, 1e6).limit_bytes == source_bytes(header)


def test_profiles_of_another_model_tell_what_fits_but_not_how_fast(
    header: Header, devices: tuple[DeviceProfile, ...]
) -> None:
    others = tuple(
        msgspec.structs.replace(
            device, times=tuple(msgspec.structs.replace(times, kind=f"other {times.kind}") for times in device.times)
        )
        for device in devices
    )
    assert budget_in_memory(header, others).limit_bytes == pytest.approx(
        budget_in_memory(header, devices).limit_bytes, rel=0.03
    )
    with pytest.raises(HomeinferError, match="have no times of this model: run homeinfer profile"):
        budget_of_tpot(header, others, 500.0)
    assert predicted_tpot(header, header, others) is None


def test_what_was_written_is_predicted_layer_by_layer(header: Header, devices: tuple[DeviceProfile, ...]) -> None:
    written = with_types(header, {tensor.name: "Q4_K" for tensor in header.tensors if len(tensor.shape) > 1})
    found = predicted_tpot(header, written, devices)
    assert found == pytest.approx(tpot_at(header, devices, source_bytes(written)), rel=0.05)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["homeinfer", "quantize", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_quantize_takes_profiles_with_measurements_and_without(
    path: Path,
    devices: tuple[DeviceProfile, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = write_profile(tmp_path / "both.json", *devices)
    assert [device.name for device in read_profiles([profile])] == ["mac", "phone"]
    bare = tmp_path / "bare.json"
    bare.write_text('{"devices": [{"name": "desk", "memory_bytes": 4000000000}]}')
    sizes = []
    ways: tuple[tuple[str | Path, ...], ...] = (
        ("--fit", profile),
        ("--fit", profile, "--tpot", "80"),
        ("--fit", bare),
    )
    for arguments in ways:
        assert run(monkeypatch, path, "--dry-run", "--json", *arguments) == 0
        sizes.append(msgspec.json.decode(capsys.readouterr().out)["size_bytes"])
    assert sizes[1] < sizes[0]
    cases: tuple[tuple[int, str, tuple[str | Path, ...]], ...] = (
        (2, "--tpot goes with --fit", ("--bpw", "4", "--tpot", "80")),
        (2, "milliseconds per token can't be", ("--fit", profile, "--tpot", "-1")),
        (1, "--tpot needs profiles with measurements", ("--fit", bare, "--tpot", "80")),
        (1, "even the smallest file", ("--fit", profile, "--tpot", "0.5")),
        (1, "two devices are called mac", ("--fit", profile, "--fit", profile)),
    )
    for code, said, more in cases:
        assert run(monkeypatch, path, "--dry-run", *more) == code
        assert said in capsys.readouterr().err
