"""Manifests: digests of the bytes that are in the files, made once, and refused where they contradict themselves."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.plan_files import planned_model
from homeinfer.cluster.weights.manifest import check_manifest, is_of, make_manifest, needed_tensors
from homeinfer.cluster.wire.control import Manifest
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.model.window_plan import plan_window
from tests.quant.f16_model import write_f16_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_f16_model(tmp_path / "model.gguf")


def changed(manifest: Manifest, **fields: object) -> Manifest:
    return msgspec.structs.replace(manifest, **fields)


@pytest.mark.parametrize("split_tensors", [0, 7])
def test_every_digest_is_that_of_the_bytes_in_the_file(tmp_path: Path, split_tensors: int) -> None:
    header = read_header(write_f16_model(tmp_path / "model.gguf", split_tensors=split_tensors))
    manifest = make_manifest(header, folder=tmp_path / "weights")
    files = [Path(file.path).read_bytes() for file in header.files]
    assert (len(files) > 1) is bool(split_tensors)
    for tensor in manifest.tensors:
        data = files[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]
        assert tensor.digest == hashlib.sha256(data).hexdigest()
    for file, data in zip(manifest.files, files, strict=True):
        assert (file.nbytes, file.digest) == (len(data), hashlib.sha256(data[: file.header_bytes]).hexdigest())
    assert manifest.digest == planned_model(header).digest
    assert is_of(manifest, header)
    check_manifest(manifest)


def test_a_model_is_read_once(model: Path, tmp_path: Path) -> None:
    first: list[float] = []
    second: list[float] = []
    manifest = make_manifest(read_header(model), first.append, tmp_path / "weights")
    assert make_manifest(read_header(model), second.append, tmp_path / "weights") == manifest
    assert first[-1] == 1.0
    assert len(first) > 2
    assert second == [1.0]


def test_reading_that_is_stopped_ends_early_and_is_no_manifest(model: Path, tmp_path: Path) -> None:
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(HomeinferError, match="was not read to its end"):
        make_manifest(read_header(model), folder=tmp_path / "weights", stopped=stopped)
    assert make_manifest(read_header(model), folder=tmp_path / "weights").tensors


def test_a_changed_model_is_read_again_even_with_its_old_time(model: Path, tmp_path: Path) -> None:
    before = make_manifest(read_header(model), folder=tmp_path / "weights")
    times = model.stat()
    with model.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    while model.stat().st_ctime_ns == times.st_ctime_ns:  # some systems' clock for files moves every 10 ms only
        os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = make_manifest(read_header(model), folder=tmp_path / "weights")
    assert after.digest == before.digest
    different = [a.name for a, b in zip(after.tensors, before.tensors, strict=True) if a.digest != b.digest]
    assert different == [max(after.tensors, key=lambda t: t.offset).name]


def test_a_file_cut_short_has_no_manifest(model: Path, tmp_path: Path) -> None:
    os.truncate(model, model.stat().st_size - 100_000)
    with pytest.raises(HomeinferError, match="cut short"):
        make_manifest(read_header(model, allow_truncated=True), folder=tmp_path / "weights")


def test_a_file_that_changed_since_its_header_was_read_is_named(model: Path, tmp_path: Path) -> None:
    header = read_header(model)
    with model.open("ab") as file:
        file.write(b"more")
    with pytest.raises(HomeinferError, match=r"model\.gguf has changed meanwhile"):
        make_manifest(header, folder=tmp_path / "weights")


def test_a_window_needs_what_it_is_cut_from(smollm2_path: Path, tmp_path: Path) -> None:
    header = read_header(smollm2_path)
    manifest = make_manifest(header, folder=tmp_path)
    edges = [(0, 7), (7, 20), (20, 30)]
    needed = [needed_tensors(header, manifest, *edge) for edge in edges]
    names = [{manifest.tensors[n].name for n in numbers} for numbers in needed]
    for (first, last), those in zip(edges, names, strict=True):
        sources = {t.source.name for t in plan_window(header, first, last).tensors if t.source is not None}
        assert those == sources | ({"token_embd.weight"} if first == 0 else set())
    assert "token_embd.weight" in names[0]
    assert "token_embd.weight" not in names[1]
    assert set().union(*names) == {tensor.name for tensor in header.tensors}
    assert needed_tensors(header, manifest, 0, 30) == tuple(range(len(manifest.tensors)))


def test_manifests_that_contradict_themselves_are_refused(model: Path, tmp_path: Path) -> None:
    manifest = make_manifest(read_header(model), folder=tmp_path / "weights")
    file, tensor = manifest.files[0], manifest.tensors[0]

    def with_file(**fields: object) -> Manifest:
        return changed(manifest, files=(msgspec.structs.replace(file, **fields),))

    def with_tensor(**fields: object) -> Manifest:
        return changed(manifest, tensors=(msgspec.structs.replace(tensor, **fields),))

    bad = [
        *(with_file(name=name) for name in ("..", ".", "", "a/b", "/etc/passwd", "a\0b", "a\nb", "é" * 200)),
        with_file(header_bytes=file.nbytes + 1),
        with_file(header_bytes=1 << 30, nbytes=1 << 40),
        with_tensor(file=1),
        with_tensor(offset=file.header_bytes - 1),
        with_tensor(offset=file.nbytes - tensor.nbytes + 1),
        with_tensor(nbytes=file.nbytes),
        changed(manifest, files=()),
        changed(manifest, files=(file, msgspec.structs.replace(file, name=file.name.upper()))),
    ]
    for one in bad:
        with pytest.raises(HomeinferError, match="model"):
            check_manifest(one)
