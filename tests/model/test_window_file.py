"""Window files on disk: whole or not there, aligned, reused, and refused where there is no room."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from homeinfer import folders
from homeinfer.engine.window import LayerWindow
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_file import ALIGNMENT, cut_windows, missing_bytes, window_path
from tests.quant.f16_model import EMBD, VOCAB, write_f16_model

WINDOWS = ((0, 1), (1, 3), (3, 4))
CUT = """
import sys
from pathlib import Path
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.model.window_file import cut_windows
try:
    cut_windows(read_header(sys.argv[1]), ((0, 1), (1, 4)), Path(sys.argv[2]))
except HomeinferError as problem:
    print(problem)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_f16_model(tmp_path / "model.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "windows"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_windows_load_in_llama_cpp(model: Path, folder: Path) -> None:
    paths = cut_windows(read_header(model), WINDOWS, folder)
    assert files(folder) == sorted(path.name for path in paths)
    rows = np.random.default_rng(0).standard_normal((2, EMBD), np.float32)
    for path, (first, last) in zip(paths[1:], WINDOWS[1:], strict=True):
        window = LayerWindow(WindowSpec(str(path), first, last, 4, 64, EMBD))
        positions = np.arange(2, dtype=np.int32)
        rows = window.forward(rows, positions, np.zeros(2, np.int32), np.ones(2, np.bool_))
        window.close()
    assert rows.shape == (2, VOCAB)
    assert np.isfinite(rows).all()


@pytest.mark.parametrize("windows", [WINDOWS, ((0, 2), (2, 4))])
def test_every_tensor_begins_on_a_page_and_is_the_models_own(
    windows: tuple[tuple[int, int], ...], model: Path, folder: Path
) -> None:
    header = read_header(model)
    copied = 0
    for path, (first, last) in zip(cut_windows(header, windows, folder), windows, strict=True):
        window = read_header(path)
        assert window.n_layer == last - first
        assert window.files[0].alignment == ALIGNMENT
        assert all(tensor.offset % ALIGNMENT == 0 for tensor in window.tensors)
        for tensor in window.tensors:
            if tensor.name.startswith("blk."):
                _, number, name = tensor.name.split(".", 2)
                source = header.tensor(f"blk.{first + int(number)}.{name}")
                assert source is not None
                assert data(path, tensor.offset, tensor.nbytes) == data(model, source.offset, source.nbytes)
                copied += 1
    assert copied == sum(tensor.name.startswith("blk.") for tensor in header.tensors)


def data(path: Path, offset: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def test_placeholders_are_holes(smollm2_path: Path, folder: Path) -> None:
    (path,) = cut_windows(read_header(smollm2_path), ((0, 1),), folder)
    assert path.stat().st_blocks * 512 < 6_000_000


def test_what_is_there_is_reused(model: Path, folder: Path) -> None:
    header = read_header(model)
    copied: list[int] = []
    assert missing_bytes(header, WINDOWS, folder) > 0
    paths = cut_windows(header, WINDOWS, folder, copied.append)
    for path in paths:
        os.utime(path, ns=(10**9, 10**9))  # a file system's clock may tick once in 10 ms only
    assert sum(copied) > 0
    assert missing_bytes(header, WINDOWS, folder) == 0
    assert cut_windows(header, WINDOWS, folder, lambda _n: pytest.fail("bytes were copied")) == paths
    assert [path.stat().st_mtime_ns for path in paths] == [10**9] * 3
    paths[1].unlink()
    assert missing_bytes(header, WINDOWS, folder) > 0
    assert cut_windows(header, WINDOWS, folder) == paths
    assert paths[1].stat().st_mtime_ns > 10**9
    assert paths[0].stat().st_mtime_ns == 10**9


def newer(model: Path) -> None:
    os.utime(model, ns=(1, 1))


def longer(model: Path) -> None:
    times = model.stat()
    with model.open("ab") as file:
        file.write(b"\0" * 32)
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))


def deeper(model: Path) -> None:
    write_f16_model(model, layers=5)


@pytest.mark.parametrize("change", [newer, longer, deeper])
def test_a_source_that_changed_is_cut_anew(change: Callable[[Path], None], model: Path, folder: Path) -> None:
    before = cut_windows(read_header(model), WINDOWS[:2], folder)
    change(model)
    header = read_header(model)
    assert missing_bytes(header, WINDOWS[:2], folder) > 0
    assert not {*cut_windows(header, WINDOWS[:2], folder)} & {*before}


def test_a_models_windows_do_not_depend_on_where_it_is(model: Path, folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / model.name
    moved.parent.mkdir()
    shutil.copy2(model, moved)
    assert window_path(read_header(model), 0, 1, folder) == window_path(read_header(moved), 0, 1, folder)


def test_a_split_model_is_cut_like_a_whole_one(model: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    part = write_f16_model(tmp_path / "split" / "model.gguf", split_tensors=7)
    header = read_header(part)
    assert len(header.files) > 2
    split = cut_windows(header, WINDOWS, tmp_path / "of-split")
    whole = cut_windows(read_header(model), WINDOWS, folder)
    for a, b in zip(split, whole, strict=True):
        left, right = read_header(a), read_header(b)
        assert left.metadata == right.metadata
        assert {t.name: data(a, t.offset, t.nbytes) for t in left.tensors} == {
            t.name: data(b, t.offset, t.nbytes) for t in right.tensors
        }


def test_a_truncated_source_is_refused(model: Path, folder: Path) -> None:
    os.truncate(model, model.stat().st_size - 1)
    header = read_header(model, allow_truncated=True)
    with pytest.raises(HomeinferError, match=rf"^{model} is cut short"):
        cut_windows(header, WINDOWS, folder)
    assert files(folder) == []


def test_a_source_that_shrinks_meanwhile_is_refused(model: Path, folder: Path) -> None:
    header = read_header(model)
    os.truncate(model, model.stat().st_size // 2)
    with pytest.raises(HomeinferError, match=r"can't be written: the source ended early$"):
        cut_windows(header, ((3, 4),), folder)
    assert files(folder) == []


def test_a_source_that_is_gone_is_refused(model: Path, folder: Path) -> None:
    header = read_header(model)
    model.unlink()
    with pytest.raises(HomeinferError, match=rf"^{model} can't be read any more: No such file or directory$"):
        cut_windows(header, WINDOWS, folder)
    assert files(folder) == []


def test_a_folder_that_cannot_be_made_is_named(model: Path) -> None:
    with pytest.raises(HomeinferError, match=rf"^{model}/windows can't be made for window files \(Not a directory\)"):
        cut_windows(read_header(model), WINDOWS, model / "windows")


def huge_model(path: Path, nbytes: int) -> Header:
    """A model with a tensor of this size, which is a hole in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    width, f16 = 1 << 20, gguf.GGMLQuantizationType.F16
    writer.add_embedding_length(width)
    for name, rows in (
        ("token_embd.weight", 32),
        ("blk.0.ffn_up.weight", nbytes // (2 * width)),
        ("blk.1.ffn_up.weight", 1),
    ):
        writer.add_tensor_info(name, (rows, width), np.dtype(np.float16), 2 * rows * width, raw_dtype=f16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 4096 + 2 * width * 33 + nbytes)
    return read_header(path)


def test_too_little_room_is_noticed_before_the_first_byte(tmp_path: Path, folder: Path) -> None:
    needed = shutil.disk_usage(tmp_path).total + (1 << 30)
    header = huge_model(tmp_path / "huge.gguf", needed)
    with pytest.raises(HomeinferError) as refused:
        cut_windows(header, ((0, 1), (1, 2)), folder)
    line = str(refused.value)
    assert re.fullmatch(rf"window files need [\d,]{{5,}} MB in {folder}, which has [\d,]+ MB free: make room .+", line)
    assert files(folder) == []


@pytest.mark.parametrize("largest_file", [100, 5_000, 500_000, 2_000_000])
def test_a_write_that_fails_leaves_nothing_behind(largest_file: int, model: Path, folder: Path) -> None:
    """No file may grow beyond `largest_file` bytes: the header fails, then a tensor, then the second file."""
    done = subprocess.run(
        [sys.executable, "-c", CUT, model, folder],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)),
    )
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith(" can't be written: File too large\n")
    assert done.stderr == ""
    assert files(folder) == []


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOMEINFER_WINDOWS", str(tmp_path))
    assert folders.windows_folder() == tmp_path
    monkeypatch.delenv("HOMEINFER_WINDOWS")
    assert folders.windows_folder().parts[-2:] == ("homeinfer", "windows")
