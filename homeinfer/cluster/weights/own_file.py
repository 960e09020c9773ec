"""A model that is this machine's own: an equal file, of which tensors count once they were read and compared."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from homeinfer.cluster.weights.digests import FileDigests, Stamp, stamp_of
from homeinfer.cluster.wire.control import Manifest
from homeinfer.model.header import Header


class OwnFile:
    """The model's own files, as they were when it was made. Methods may be called from several threads."""

    def __init__(self, header: Header, manifest: Manifest, digests: FileDigests) -> None:
        """Keeps nothing of the header, which takes tens of megabytes. Raises OSError when a file is gone."""
        self.paths = tuple(Path(file.path) for file in header.files)
        self._manifest = manifest
        self._digests = digests
        self._stamps = tuple(stamp_of(path) for path in self.paths)
        self._changing = threading.Lock()
        self._checked: set[int] = set()
        self.differs = False
        for file, path in enumerate(self.paths):
            self._compare(file, dict(digests.known(path)))

    def is_as_it_was(self) -> bool:
        """Whether no file has changed or gone meanwhile."""
        try:
            return all(stamp_of(path) == stamp for path, stamp in zip(self.paths, self._stamps, strict=True))
        except OSError:
            return False

    @property
    def tensors(self) -> frozenset[int]:
        """Read and equal."""
        with self._changing:
            return frozenset(self._checked)

    def has(self, tensor: int) -> bool:
        """Whether this tensor was read and is equal."""
        return tensor in self._checked

    def check(
        self, tensors: Iterable[int], on_bytes: Callable[[int], None], stopped: threading.Event | None = None
    ) -> None:
        """Read these tensors where that was not done yet; `differs` tells whether one is not the manifest's. Raises
        HomeinferError when a file can't be read or changes meanwhile."""
        all_tensors = self._manifest.tensors
        wanted = [all_tensors[n] for n in sorted(set(tensors) - self.tensors)]
        for file, path in enumerate(self.paths):
            ranges = [(t.offset, t.nbytes) for t in wanted if t.file == file]
            if ranges:
                self._compare(file, dict(self._digests.compute(path, ranges, on_bytes, stopped)))

    def _compare(self, file: int, found: dict[tuple[int, int], str]) -> None:
        right, wrong = set(), False
        for number, tensor in enumerate(self._manifest.tensors):
            text = found.get((tensor.offset, tensor.nbytes)) if tensor.file == file else None
            if text == tensor.digest:
                right.add(number)
            elif text is not None:
                wrong = True
        with self._changing:
            self._checked |= right
            self.differs = self.differs or wrong

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """Raises OSError, also when the file has changed."""
        with self.paths[file].open("rb", buffering=0) as opened:
            found = os.fstat(opened.fileno())
            if Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns) != self._stamps[file]:
                raise OSError("the file has changed")
            opened.seek(offset)
            data = opened.read(nbytes)
        if len(data) != nbytes:
            raise OSError("the file ends early")
        return data
