from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant import kept as keeping
from homeinfer.quant.kept import in_use, kept_folder, model_digest, prune, tokens_digest
from tests.quant.f16_model import write_f16_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_f16_model(tmp_path / "model.gguf", layers=1)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_a_digest_changes_with_one_byte(place: float, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_REGION", 100_000)
    header = read_header(model)
    shares: list[float] = []
    digest = model_digest(header, shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 5
    assert shares[-1] == 1
    assert model_digest(read_header(model)) == digest
    data = bytearray(model.read_bytes())
    data[int(place * len(data))] ^= 1
    model.write_bytes(data)
    assert model_digest(header) != digest


def test_regions_cannot_change_places(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_REGION", 100_000)
    header, data = read_header(model), model.read_bytes()
    digest = model_digest(header)
    model.write_bytes(data[100_000:200_000] + data[:100_000] + data[200_000:])
    assert model_digest(header) != digest


def test_a_split_model_is_hashed_as_a_whole(tmp_path: Path) -> None:
    first = write_f16_model(tmp_path / "split.gguf", layers=2, split_tensors=8)
    header = read_header(first)
    assert len(header.files) > 1
    digest = model_digest(header)
    last = Path(header.files[-1].path)
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    assert model_digest(header) != digest


@pytest.mark.parametrize(("spoil", "said"), [("cut", "cut short meanwhile"), ("gone", "can't be read any more")])
def test_a_file_that_is_lost_meanwhile_is_said(spoil: str, said: str, model: Path) -> None:
    header = read_header(model)
    if spoil == "cut":
        os.truncate(model, 1000)
    else:
        model.unlink()
    with pytest.raises(HomeinferError, match=said):
        model_digest(header)


def test_the_digest_of_tokens_is_of_their_chunks() -> None:
    tokens = np.arange(40, dtype=np.int32)
    whole = tokens_digest([tokens[:20], tokens[20:]])
    assert whole == tokens_digest([tokens[:20].copy(), tokens[20:]])
    assert whole != tokens_digest([tokens[:10], tokens[10:]])
    assert whole != tokens_digest([tokens[:20], tokens[20:] + 1])


def test_the_folder_is_the_named_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOMEINFER_KEPT", str(tmp_path))
    assert kept_folder() == tmp_path
    monkeypatch.delenv("HOMEINFER_KEPT")
    assert kept_folder().parts[-2:] == ("homeinfer", "quant")


def used(folder: Path, name: str, age: int) -> Path:
    with in_use(folder / name) as path:
        (path / "some.npy").write_bytes(b"1")
    os.utime(path, (age, age))
    return path


def test_the_models_used_longest_ago_are_removed(tmp_path: Path) -> None:
    folders = [used(tmp_path, f"{name}", 1000 + age) for name, age in (("b", 30), ("a", 10), ("d", 20), ("c", 40))]
    (tmp_path / "not ours").mkdir()
    with in_use(folders[1]):
        pass
    assert prune(tmp_path, keep=2) == (folders[0], folders[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "not ours"]


def test_a_model_that_a_process_uses_stays(tmp_path: Path) -> None:
    program = (
        "import sys; from homeinfer.quant.kept import *\nwith in_use(Path(sys.argv[1])): print(flush=True), input()"
    )
    folder = tmp_path / "used"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert prune(tmp_path, keep=0) == ()
        assert folder.is_dir()
    finally:
        process.kill()
        process.communicate()
    assert list((folder / "users").iterdir())  # it died without a word
    assert prune(tmp_path, keep=0) == (folder,)


def test_two_users_of_one_process_do_not_end_each_other(tmp_path: Path) -> None:
    with in_use(tmp_path / "a"):
        with in_use(tmp_path / "a"):
            pass
        assert prune(tmp_path, keep=0) == ()
    assert prune(tmp_path, keep=0) == (tmp_path / "a",)


def test_nothing_kept_is_nothing_to_prune(tmp_path: Path) -> None:
    assert prune(tmp_path / "nowhere") == ()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HomeinferError, match="set HOMEINFER_KEPT"), in_use(tmp_path / "file" / "model"):
        pass
