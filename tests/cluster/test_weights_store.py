"""What is on a device's disk: its own equal file, or a copy with holes, and nothing counts that was not checked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.weights import room
from homeinfer.cluster.weights.manifest import make_manifest, needed_tensors
from homeinfer.cluster.weights.messages import PIECE_BYTES
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire.control import Manifest
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.model.window_file import cut_windows, window_path
from tests.cluster.weights_peers import fill
from tests.quant.f16_model import write_f16_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "head").mkdir()
    return write_f16_model(tmp_path / "head" / "model.gguf")


@pytest.fixture
def manifest(model: Path, tmp_path: Path) -> Manifest:
    return make_manifest(read_header(model), folder=tmp_path / "head")


def every(manifest: Manifest) -> tuple[int, ...]:
    return tuple(range(len(manifest.tensors)))


def spoil(path: Path, offset: int) -> None:
    before = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    while path.stat().st_mtime_ns == before:  # some systems' clock for files moves every 10 ms only
        os.utime(path)


def test_an_equal_file_is_found_and_counts_once_it_was_read(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    deep = tmp_path / "models" / "publisher" / "name"
    deep.mkdir(parents=True)
    shutil.copy(model, deep / model.name)
    store = Store(tmp_path / "weights", [tmp_path / "models"])
    store.know(manifest)
    assert store.own_path == deep / model.name
    assert store.holds() == ()
    shares: list[float] = []
    assert store.check(range(5), shares.append) == ()
    assert shares[-1] == 1.0
    assert store.holds() == (0, 1, 2, 3, 4)
    assert store.header().tensors == read_header(model).tensors
    store.close()
    again = Store(tmp_path / "weights", [tmp_path / "models"])
    again.know(manifest)
    assert again.holds() == (0, 1, 2, 3, 4)
    assert again.check(every(manifest)) == ()
    assert not (tmp_path / "weights" / "models").exists()


def test_all_parts_of_a_split_model_are_found_together(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    first = write_f16_model(tmp_path / "head" / "model.gguf", split_tensors=7)
    manifest = make_manifest(read_header(first), folder=tmp_path / "head")
    store = Store(tmp_path / "weights", [tmp_path / "head"])
    store.know(manifest)
    assert store.check(every(manifest)) == ()
    store.close()
    (tmp_path / "head" / manifest.files[2].name).unlink()
    store.know(manifest)
    assert store.own_path is None
    assert store.missing_headers == tuple(range(len(manifest.files)))
    store.close()


def test_the_heads_own_agent_reads_nothing_twice(model: Path, tmp_path: Path) -> None:
    manifest = make_manifest(read_header(model), folder=tmp_path / "weights")
    store = Store(tmp_path / "weights", [model])
    store.know(manifest)
    assert store.holds() == every(manifest)


def test_a_file_with_other_weights_is_not_used(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(model, tmp_path / "models")
    spoil(tmp_path / "models" / model.name, manifest.tensors[3].offset + 7)
    store = Store(tmp_path / "weights", [tmp_path / "models"])
    store.know(manifest)
    assert store.check([0, 1]) == ()
    assert store.check([1, 3]) == (1, 3)
    assert store.own_path is None
    assert store.holds() == ()
    assert "its weights are others" in store.remark
    store.close()
    store.know(manifest)
    assert store.own_path is None
    store.close()


def test_a_file_with_another_header_is_not_used(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(model, tmp_path / "models")
    spoil(tmp_path / "models" / model.name, model.read_bytes().index(b"random llama"))
    assert (tmp_path / "models" / model.name).stat().st_size == model.stat().st_size
    store = Store(tmp_path / "weights", [tmp_path / "models"])
    store.know(manifest)
    assert store.own_path is None
    store.close()


def test_an_own_file_that_changes_later_is_dropped(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    store = Store(tmp_path / "weights", [model.parent])
    store.know(manifest)
    assert store.check(every(manifest)) == ()
    tensor = manifest.tensors[0]
    assert store.read(manifest.digest, 0, tensor.offset, 10) is not None
    spoil(model, tensor.offset)
    assert store.read(manifest.digest, 0, tensor.offset, 10) is None
    assert store.holds() == ()
    assert "has changed" in store.remark
    store.close()


def test_windows_cut_from_a_partly_filled_copy_are_the_originals(smollm2_path: Path, tmp_path: Path) -> None:
    header = read_header(smollm2_path)
    manifest = make_manifest(header, folder=tmp_path / "head")
    store = Store(tmp_path / "weights")
    store.know(manifest)
    windows = ((0, 1), (12, 13))
    needed = sorted({n for edge in windows for n in needed_tensors(header, manifest, *edge)})
    fill(store, smollm2_path, needed[:-1])
    with pytest.raises(HomeinferError, match=f"1 of {len(needed)} tensors"):
        store.cut(windows, tmp_path / "cut")
    fill(store, smollm2_path, needed[-1:])
    cut = store.cut(windows, tmp_path / "cut")
    for ours, theirs in zip(cut, cut_windows(header, windows, tmp_path / "theirs"), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    copy = Path(store.header().files[0].path)
    assert copy.stat().st_size == smollm2_path.stat().st_size
    assert copy.stat().st_blocks * 512 < 0.5 * copy.stat().st_size
    fill(store, smollm2_path, store.missing(needed_tensors(header, manifest, 15, 16)))
    store.save()
    assert [window_path(store.header(), *edge, tmp_path / "cut") for edge in windows] == cut
    store.close()


def test_what_was_written_is_still_there_in_the_next_run(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    store = Store(tmp_path / "weights")
    store.know(manifest)
    with pytest.raises(HomeinferError, match="headers have not come"):
        store.header()
    fill(store, model, (1, 2))
    large = max(every(manifest), key=lambda n: manifest.tensors[n].nbytes)
    data = model.read_bytes()[manifest.tensors[large].offset :][:PIECE_BYTES]
    store.write(large, 0, data)
    store.close()
    store = Store(tmp_path / "weights")
    store.know(manifest)
    assert store.missing_headers == ()
    assert store.holds() == (1, 2)
    assert store.pieces(large) == {0}
    store.close()


def test_wrong_weights_do_not_count(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    store = Store(tmp_path / "weights")
    store.know(manifest)
    fill(store, model, ())
    tensor = manifest.tensors[5]
    for offset in range(0, tensor.nbytes, PIECE_BYTES):
        store.write(5, offset, b"\1" * min(PIECE_BYTES, tensor.nbytes - offset))
    assert not store.finish(5)
    assert store.holds() == ()
    assert store.pieces(5) == frozenset()
    assert store.read(manifest.digest, 0, tensor.offset, 16) is None
    fill(store, model, (5,))
    assert store.holds() == (5,)
    with pytest.raises(HomeinferError, match="not written again"):
        store.write(5, 0, b"\1" * min(PIECE_BYTES, tensor.nbytes))
    store.close()


def test_only_pieces_of_the_model_are_written(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    store = Store(tmp_path / "weights")
    store.know(manifest)
    with pytest.raises(HomeinferError, match="not the model's"):
        store.write_header(0, b"\0" * manifest.files[0].header_bytes)
    fill(store, model, ())
    for offset, data in (
        (1, b"x"),
        (0, b"x"),
        (PIECE_BYTES * 100, b""),
        (-PIECE_BYTES, b"x" * PIECE_BYTES),
        (0, b"x" * (1 << 22)),
    ):
        with pytest.raises(HomeinferError, match="no piece of it"):
            store.write(0, offset, data)
    with pytest.raises(HomeinferError, match="does not have"):
        store.check([len(manifest.tensors)])
    store.close()


def test_a_model_of_the_same_headers_and_other_weights_shares_nothing(
    model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    store = Store(tmp_path / "weights")
    store.know(manifest)
    fill(store, model, every(manifest))
    first = store.cut(((0, 2),), tmp_path / "cut")
    spoil(model, manifest.tensors[0].offset)
    other = make_manifest(read_header(model), folder=tmp_path / "head")
    assert other.digest == manifest.digest
    store.know(other)
    assert store.holds() == ()
    fill(store, model, every(other))
    assert store.cut(((0, 2),), tmp_path / "cut") != first
    store.close()


def test_two_processes_do_not_write_into_one_copy(manifest: Manifest, tmp_path: Path) -> None:
    one, two = Store(tmp_path / "weights"), Store(tmp_path / "weights")
    one.know(manifest)
    with pytest.raises(HomeinferError, match="another homeinfer"):
        two.know(manifest)
    one.close()
    two.know(manifest)
    two.close()


def test_a_full_disk_is_said_before_the_first_byte(
    model: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "weights")
    store.know(manifest)
    fill(store, model, (0,))
    needed = sum(t.nbytes for t in manifest.tensors[1:])
    monkeypatch.setattr(room, "free_bytes", lambda _folder: room.RESERVE_BYTES + needed)
    store.make_room(every(manifest))
    monkeypatch.setattr(room, "free_bytes", lambda _folder: room.RESERVE_BYTES + needed - 1)
    store.make_room((1, 2, 3))
    with pytest.raises(HomeinferError, match="make room there or set HOMEINFER_WEIGHTS"):
        store.make_room(every(manifest))
    with pytest.raises(HomeinferError, match="make room there"):
        store.make_room((1, 2, 3), also_bytes=needed)
    store.close()


def test_older_models_make_room_and_the_one_in_use_stays(
    model: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for number, layers in enumerate((2, 3)):
        (tmp_path / str(number)).mkdir()
        older = write_f16_model(tmp_path / str(number) / "older.gguf", layers=layers)
        store = Store(tmp_path / "weights")
        store.know(make_manifest(read_header(older), folder=tmp_path / "head"))
        fill(store, older, range(5))
        folders.append(Path(store.header().files[0].path).parents[1])
        store.close()
        os.utime(folders[-1], (number + 1, number + 1))
    used = Store(tmp_path / "weights")
    used.know(manifest)
    fill(used, model, (0, 1))
    needed = sum(t.nbytes for t in manifest.tensors[2:])

    def free(_folder: Path) -> int:
        return room.RESERVE_BYTES + needed - 1000 * sum(folder.exists() for folder in folders[:1])

    monkeypatch.setattr(room, "free_bytes", free)
    used.make_room(every(manifest))
    assert [folder.exists() for folder in folders] == [False, True]
    assert used.holds() == (0, 1)
    with pytest.raises(HomeinferError, match="make room"):
        used.make_room(every(manifest), also_bytes=1 << 40)
    assert folders[1].exists()
    used.close()


def test_what_a_killed_process_left_is_removed(manifest: Manifest, tmp_path: Path) -> None:
    store = Store(tmp_path / "weights")
    store.know(manifest)
    store.close()
    [folder] = (tmp_path / "weights" / "models").iterdir()
    left_over = folder / ".homeinfer-0badcafe.partial"
    left_over.write_bytes(b"half")
    store.know(manifest)
    assert not left_over.exists()
    store.close()


def test_headers_that_tell_otherwise_than_the_manifest_are_refused(
    model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    first, second, *others = manifest.tensors
    swapped = (
        msgspec.structs.replace(first, name=second.name),
        msgspec.structs.replace(second, name=first.name),
        *others,
    )
    store = Store(tmp_path / "weights", [model.parent])
    store.know(msgspec.structs.replace(manifest, tensors=swapped))
    assert store.own_path is None
    fill(store, model, ())
    with pytest.raises(HomeinferError, match="described otherwise than its header"):
        store.header()
    store.close()
