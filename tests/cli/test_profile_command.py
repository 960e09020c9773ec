"""`homeinfer profile` as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.planning.profile import VERSION, Disk, ProfileFile
from homeinfer.cluster.profiles_file import read_device_profiles
from homeinfer.profiling import measure
from homeinfer.profiling.cache import Cache
from homeinfer.profiling.machine import this_machine
from homeinfer.profiling.measure import Base
from homeinfer.quant.budget import read_profiles
from tests.cli.conftest import Homeinfer

BASE = Base(20e9, 60_000_000, 0.1, 0.3, 9e9, 0.01, False)
DISK = Disk(1e9, 1e9, 1e8, 0)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows_folder: Path) -> Path:
    """A cache that knows this machine: measuring is what tests/profiling does."""
    monkeypatch.setenv("HOMEINFER_PROFILES", str(tmp_path / "profiles"))
    cache = Cache(this_machine(), 1, tmp_path / "profiles")
    cache.put(measure.BASE, BASE)
    cache.put(f"disk {windows_folder.stat().st_dev}", DISK)
    return tmp_path


def profile(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "homeinfer", "profile", *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})


def test_the_file_and_the_json_are_what_plan_and_quantize_read(measured: Path) -> None:
    target = measured / "desk.json"
    done = profile("--json", "-o", target, "--name", "desk", "--threads", "1")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=ProfileFile)
    assert found.version == VERSION
    assert msgspec.json.decode(target.read_bytes(), type=ProfileFile) == found
    assert read_device_profiles([target]) == found.devices
    assert read_profiles([target])[0].name == "desk"
    assert found.devices[0].disk.free_bytes > 0
    assert {path.name for path in measured.iterdir()} == {"profiles", "desk.json"}


def test_people_get_a_table(measured: Path) -> None:
    done = profile("--name", "desk", "-t", "1")
    assert done.returncode == 0, done.stderr
    for said in ("desk", "processor", "memory", "1.0 GB/s by layer", "can be used now"):
        assert said in done.stdout
    assert measured.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("missing.gguf",), "there is no such file"),
        (("--name", "a\tb"), "is no name for a device"),
        (("-o", "missing/desk.json"), "there is no such folder"),
        (("-o", "."), "this is a directory"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_measured(
    words: tuple[str, ...], said: str, homeinfer: Homeinfer
) -> None:
    done = homeinfer("profile", *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_file_that_is_no_model_and_a_disk_without_a_folder_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, homeinfer: Homeinfer
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOMEINFER_WINDOWS", str(tmp_path / "file" / "windows"))
    for done in (homeinfer("profile", broken), homeinfer("profile")):
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_negative_number_of_threads_is_wrong_usage(homeinfer: Homeinfer) -> None:
    assert homeinfer("profile", "--threads", "-1").returncode == 2
