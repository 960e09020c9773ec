"""The cluster's model among this machine's own files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from homeinfer.cluster.weights.digests import range_digest
from homeinfer.cluster.weights.manifest import is_of
from homeinfer.cluster.wire.control import Manifest
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header

_DEPTH: Final = 4
_MOST_FOLDERS: Final = 5000


def find_model(manifest: Manifest, places: Sequence[Path], besides: Path) -> Header | None:
    """A model with the manifest's file names, sizes and headers in one of these folders, or up to four folders deeper
    (or beside a file that is named), but not inside `besides`. Its tensors' data are not looked at."""
    tried: set[str] = set()
    for folder in _folders(places, os.path.realpath(besides)):
        if folder not in tried:
            tried.add(folder)
            header = _in_folder(manifest, Path(folder))
            if header is not None:
                return header
    return None


def _folders(places: Sequence[Path], besides: str) -> Iterator[str]:
    left = _MOST_FOLDERS
    for place in places:
        top = os.path.realpath(place if place.is_dir() else place.parent)
        for folder, inside, _files in os.walk(top):
            deep = len(Path(folder).relative_to(top).parts)
            inside[:] = [] if deep >= _DEPTH else sorted(one for one in inside if os.path.join(folder, one) != besides)  # noqa: PTH118
            left -= 1
            if left < 0:
                return
            if folder != besides:
                yield folder


def _in_folder(manifest: Manifest, folder: Path) -> Header | None:
    paths = [folder / file.name for file in manifest.files]
    try:
        for path, file in zip(paths, manifest.files, strict=True):
            if not path.is_file() or path.stat().st_size != file.nbytes:
                return None
        for path, file in zip(paths, manifest.files, strict=True):
            if range_digest(path, (0, file.header_bytes)) != file.digest:
                return None
        header = read_header(paths[0], vocabulary=False)
    except (OSError, HomeinferError):
        return None
    return header if is_of(manifest, header) else None
