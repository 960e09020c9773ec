"""What a model consists of, for devices that exchange it: digests of its headers and of every tensor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from homeinfer.cluster.weights.digests import FileDigests, range_digest
from homeinfer.cluster.weights.shares import Shares
from homeinfer.cluster.wire.control import Manifest, ModelFile, ModelTensor
from homeinfer.errors import HomeinferError
from homeinfer.folders import weights_folder
from homeinfer.model.header import Header, HeaderFile, printable

MOST_HEADER_BYTES: Final = 65 << 20
"""The reader takes no metadata of more than 64 MiB; with the padding behind it."""
_MOST_FILES: Final = 1024
_NOT_ON_WINDOWS: Final = frozenset('<>:"|?*')


def digests_folder(folder: Path) -> Path:
    """Where digests of files are remembered, in a weights folder: the same for who makes a manifest and who checks
    it, so that the head's own agent reads nothing twice."""
    return folder / "digests"


def make_manifest(
    header: Header,
    on_progress: Callable[[float], None] = lambda _share: None,
    folder: Path | None = None,
    stopped: threading.Event | None = None,
) -> Manifest:
    """The model's manifest. Slow the first time (reads the whole model), then known by its files' paths, sizes and
    times of change, in `folder` (default: folders.weights_folder()).

    on_progress: share 0 to 1, from any thread; stopped: end early. Raises HomeinferError when a file is cut short or
    can't be read, or when stopped.
    """
    from homeinfer.cluster.plan_files import header_digest  # an idle agent, which makes none, does without planning

    if header.truncated:
        raise HomeinferError(f"{printable(header.files[0].path, 1000)} is cut short: download it again")
    known = FileDigests(digests_folder(folder or weights_folder()))
    report = Shares(header.nbytes, on_progress)
    digests: dict[tuple[int, int, int], str] = {}
    for number, file in enumerate(header.files):
        ranges = [(t.offset, t.nbytes) for t in header.tensors if t.file == number]
        found = known.compute(Path(file.path), ranges, report.add, stopped)
        if stopped is not None and stopped.is_set():
            raise HomeinferError(f"{printable(file.path, 1000)} was not read to its end")
        digests |= {(number, *part): text for part, text in found.items()}
    return Manifest(
        digest=header_digest(header),
        files=tuple(_model_file(file) for file in header.files),
        tensors=tuple(
            ModelTensor(t.name, t.file, t.offset, t.nbytes, digests[t.file, t.offset, t.nbytes]) for t in header.tensors
        ),
    )


def needed_tensors(header: Header, manifest: Manifest, first: int, last: int) -> tuple[int, ...]:
    """What the window of layers [first, last) is cut from, the embedding for the first one too: numbers in
    manifest.tensors, in order. The whole model is loaded as it is and needs all of them. Raises HomeinferError for
    layers that can't be a window."""
    from homeinfer.model.window_plan import n_layers, plan_window

    if (first, last) == (0, n_layers(header)):
        return tuple(range(len(manifest.tensors)))
    names = {t.source.name for t in plan_window(header, first, last).tensors if t.source is not None}
    if first == 0:
        names.add("token_embd.weight")
    return tuple(number for number, tensor in enumerate(manifest.tensors) if tensor.name in names)


def check_manifest(manifest: Manifest) -> None:
    """Raises HomeinferError for one that contradicts itself or names files that can't be."""
    files = manifest.files
    names = {file.name.casefold() for file in files}
    if not 1 <= len(files) <= _MOST_FILES or len(names) != len(files) or not all(_is_plain(f.name) for f in files):
        raise HomeinferError("the cluster's model has file names that can't be used here: rename it on the head")
    if any(file.header_bytes > min(file.nbytes, MOST_HEADER_BYTES) for file in files):
        raise HomeinferError("the cluster's model is described wrongly: a header is larger than any model's")
    for tensor in manifest.tensors:
        if tensor.file >= len(files):
            raise HomeinferError(f"the cluster's model is described wrongly: {printable(tensor.name)} is in no file")
        file = files[tensor.file]
        if tensor.offset < file.header_bytes or tensor.offset + tensor.nbytes > file.nbytes:
            raise HomeinferError(f"the cluster's model is described wrongly: {printable(tensor.name)} is outside it")


def is_of(manifest: Manifest, header: Header) -> bool:
    """Whether sizes and tensors are those that the header tells."""
    return [(f.nbytes, f.header_bytes) for f in manifest.files] == [(f.size, f.data_offset) for f in header.files] and [
        (t.name, t.file, t.offset, t.nbytes) for t in manifest.tensors
    ] == [(t.name, t.file, t.offset, t.nbytes) for t in header.tensors]


def _model_file(file: HeaderFile) -> ModelFile:
    path = Path(file.path)
    if not _is_plain(path.name):
        raise HomeinferError(f"{printable(path.name, 300)}: other devices can't use this name: rename the file")
    try:
        if path.stat().st_size != file.size:
            raise HomeinferError(f"{printable(file.path, 1000)} has changed meanwhile: start again")
        digest = range_digest(path, (0, file.data_offset))
    except OSError as problem:
        raise HomeinferError(f"{printable(file.path, 1000)} can't be read any more: {problem.strerror}") from None
    return ModelFile(path.name, file.size, file.data_offset, digest)


def _is_plain(name: str) -> bool:
    """Whether it is a name of a file in a folder, and nothing else."""
    usable = name.isprintable() and len(os.fsencode(name)) <= 255 and not set(name) & set("/\\")
    on_windows = os.name == "nt" and (set(name) & _NOT_ON_WINDOWS or name.endswith((" ", ".")))
    return usable and name.strip(". ") != "" and not on_windows
