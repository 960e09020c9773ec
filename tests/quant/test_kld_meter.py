"""A working copy that llama.cpp runs while its weights change, and the process that measures what that does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant.kld_meter import KldMeter
from homeinfer.quant.work_copy import WorkCopy, enough_space
from tests.quant.f16_model import VOCAB, write_f16_model
from tests.support.processes import have_ended, wait_until

Ints = npt.NDArray[np.int32]
NAME = "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("f16") / "model.gguf")


@pytest.fixture
def chunks() -> list[Ints]:
    return list(np.random.default_rng(3).integers(0, VOCAB, (2, 48), np.int32))


@pytest.fixture
def copy(model_path: Path, tmp_path: Path) -> Iterator[WorkCopy]:
    with WorkCopy(read_header(model_path), tmp_path / "kept") as made:
        yield made


def halved(copy: WorkCopy, name: str) -> bytes:
    return (np.frombuffer(copy.original(name), np.float16) / 2).astype(np.float16).tobytes()


def test_writing_into_the_mapped_file_changes_the_kld_and_restoring_brings_exactly_zero_back(
    copy: WorkCopy, chunks: list[Ints]
) -> None:
    with KldMeter(copy.path, copy.folder, chunks, 1) as meter:
        assert meter.positions == 2 * 23
        assert meter.measure().mean == 0.0
        copy.write(NAME, halved(copy, NAME))
        changed = meter.measure()
        assert changed.mean > 10 * changed.stderr > 0
        assert meter.measure() == changed
        copy.restore(NAME)
        again = meter.measure()
    assert (again.mean, again.stderr) == (0.0, 0.0)


def test_the_kld_is_that_of_a_model_that_was_written_so(model_path: Path, tmp_path: Path, chunks: list[Ints]) -> None:
    """The same weights opened as a file of their own have the reference's logits for the changed model."""
    header = read_header(model_path)
    with WorkCopy(header, tmp_path) as copy, KldMeter(copy.path, copy.folder, chunks, 1) as meter:
        copy.write(NAME, halved(copy, NAME))
        there = meter.measure()
        with KldMeter(copy.path, copy.folder, chunks, 1) as from_changed:
            copy.restore(NAME)
            back = from_changed.measure()
    assert back.mean == pytest.approx(there.mean, rel=0.5)


def test_the_copy_holds_the_bytes_of_its_source_and_leaves_nothing_behind(model_path: Path, tmp_path: Path) -> None:
    with WorkCopy(read_header(model_path), tmp_path) as copy:
        assert copy.path.read_bytes() == model_path.read_bytes()
        copy.write(NAME, halved(copy, NAME))
    assert not list(tmp_path.iterdir())


def test_a_split_source_becomes_one_file_of_the_same_weights(tmp_path: Path, chunks: list[Ints]) -> None:
    first = write_f16_model(tmp_path / "split.gguf", layers=2, split_tensors=5)
    header = read_header(first)
    seen: list[float] = []
    with WorkCopy(header, tmp_path / "kept", seen.append) as copy:
        assert len(header.files) > 1
        assert len(copy.header.files) == 1
        for tensor in gguf.GGUFReader(copy.path).tensors:
            assert tensor.data.tobytes() == copy.original(tensor.name)
        with KldMeter(copy.path, copy.folder, chunks, 1) as meter:
            copy.write(NAME, halved(copy, NAME))
            assert meter.measure().mean > 0
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


def test_bytes_of_another_size_are_refused(copy: WorkCopy) -> None:
    with pytest.raises(ValueError, match="bytes for a tensor of"):
        copy.write(NAME, b"1234")


def test_a_disk_without_room_is_one_line_before_the_first_byte(model_path: Path, tmp_path: Path) -> None:
    header = read_header(model_path)
    assert enough_space(header, tmp_path)
    huge = msgspec.structs.replace(header, files=(msgspec.structs.replace(header.files[0], size=1 << 60),))
    assert not enough_space(huge, tmp_path)
    with pytest.raises(HomeinferError, match="the disk is too full for a working copy"), WorkCopy(huge, tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(model_path: Path, tmp_path: Path) -> None:
    header = read_header(model_path)
    left = tmp_path / ".homeinfer-work-dead"
    left.mkdir()
    (left / "model.gguf").write_bytes(b"half")
    with WorkCopy(header, tmp_path) as first, WorkCopy(header, tmp_path) as second:
        assert not left.exists()
        assert first.path.exists()
        assert second.path.exists()


def test_a_killed_meter_is_one_line(copy: WorkCopy, chunks: list[Ints]) -> None:
    with KldMeter(copy.path, copy.folder, chunks, 1) as meter:
        os.kill(meter.pid, signal.SIGKILL)
        with pytest.raises(HomeinferError, match=r"^[^\n]*was killed[^\n]*run it again$"):
            meter.measure()


def test_weights_that_are_not_finite_give_no_number_and_later_ones_do(copy: WorkCopy, chunks: list[Ints]) -> None:
    with KldMeter(copy.path, copy.folder, chunks, 1) as meter:
        copy.write(NAME, np.full(copy.header.by_name[NAME].n_weights, np.nan, np.float16).tobytes())
        assert np.isnan(meter.measure().mean)
        copy.restore(NAME)
        assert meter.measure().mean == 0.0


def test_a_damaged_reference_and_a_file_cut_short_are_one_line(
    model_path: Path, tmp_path: Path, chunks: list[Ints]
) -> None:
    with WorkCopy(read_header(model_path), tmp_path) as copy:
        copy.write(NAME, np.full(copy.header.by_name[NAME].n_weights, np.nan, np.float16).tobytes())
        with pytest.raises(HomeinferError, match="not finite"), KldMeter(copy.path, copy.folder, chunks, 1):
            pass
        os.truncate(copy.path, copy.path.stat().st_size // 2)
        with pytest.raises(HomeinferError, match="cut short"), KldMeter(copy.path, copy.folder, chunks, 1):
            pass


def test_tokens_that_the_model_does_not_have_are_one_line(copy: WorkCopy) -> None:
    strange = [np.full(16, VOCAB + 5, np.int32)]
    with pytest.raises(HomeinferError, match="llama_decode failed"), KldMeter(copy.path, copy.folder, strange, 1):
        pass
    with pytest.raises(HomeinferError, match="too short"):
        KldMeter(copy.path, copy.folder, [np.zeros(3, np.int32)], 1)


PARENT = """
import sys, time
from pathlib import Path
import numpy as np
from homeinfer.model.header import read_header
from homeinfer.quant.kld_meter import KldMeter
from homeinfer.quant.work_copy import WorkCopy
with WorkCopy(read_header(sys.argv[1]), Path(sys.argv[2])) as copy:
    with KldMeter(copy.path, copy.folder, [np.arange(48, dtype=np.int32)], 1) as meter:
        print(meter.pid, flush=True)
        while True:
            meter.measure()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_parent_that_dies(model_path: Path, tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, str(model_path), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        meter = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(how)
    wait_until(lambda: have_ended([meter]) and not list(tmp_path.iterdir()))
