"""What of the cluster's model is on this disk: the machine's own file where there is an equal one, else a copy with
holes that other devices fill."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from homeinfer.cluster.weights.digests import FileDigests
from homeinfer.cluster.weights.find import find_model
from homeinfer.cluster.weights.manifest import check_manifest, digests_folder, needed_tensors
from homeinfer.cluster.weights.own_file import OwnFile
from homeinfer.cluster.weights.room import make_room
from homeinfer.cluster.weights.shares import Shares
from homeinfer.cluster.weights.sparse_copy import SparseCopy
from homeinfer.cluster.wire.control import Manifest
from homeinfer.errors import HomeinferError
from homeinfer.folders import free_bytes
from homeinfer.model.header import Header, printable, read_header

if TYPE_CHECKING:
    from homeinfer.model.window_file import Progress


class Store:
    """Methods may be called from any thread; those marked slow by asyncio.to_thread, so that beats go on."""

    def __init__(self, folder: Path, models: Sequence[Path] = ()) -> None:
        """folder: folders.weights_folder(). models: folders to look in for an equal file (or files: beside them)."""
        self._models = folder / "models"
        self._folder = folder
        self._places = tuple(models)
        self._digests = FileDigests(digests_folder(folder))
        self._changing = threading.RLock()
        self._manifest: Manifest | None = None
        self._by_offset: list[tuple[int, int, int]] = []
        self._own: OwnFile | None = None
        self._copy: SparseCopy | None = None
        self.remark = ""
        """Why a file that looked equal isn't used, for the user; else empty."""

    def know(self, manifest: Manifest) -> None:
        """Slow. The model from now on: looks for an equal file, else opens the copy. Again with the same manifest: only
        looks whether all is as it was.

        Raises HomeinferError for a manifest that contradicts itself, when the folder can't be made, or when another
        process uses the copy.
        """
        check_manifest(manifest)
        with self._changing:
            if manifest == self._manifest and (self._copy is not None or self._still_own() is not None):
                return
            self._forget()
            self._by_offset = sorted((t.file, t.offset, number) for number, t in enumerate(manifest.tensors))
            self._own = self._find(manifest)
            if self._own is None:
                self._copy = SparseCopy(self._models, manifest)
            self._manifest = manifest

    def _find(self, manifest: Manifest) -> OwnFile | None:
        header = find_model(manifest, self._places, self._folder)
        if header is None:
            return None
        try:
            own = OwnFile(header, manifest, self._digests)
        except OSError:
            return None
        if own.differs:
            self._differs(own)
            return None
        return own

    def _differs(self, own: OwnFile) -> None:
        self.remark = (
            f"{printable(str(own.paths[0]), 1000)} looks like the cluster's model, but its weights are others: not used"
        )

    def _forget(self) -> None:
        if self._copy is not None:
            self._copy.close()
        self._manifest, self._own, self._copy, self.remark = None, None, None, ""

    def _still_own(self) -> OwnFile | None:
        """The own file; when it has changed the copy takes its place."""
        with self._changing:
            if self._own is not None and self._manifest is not None and not self._own.is_as_it_was():
                self.remark = f"{printable(str(self._own.paths[0]), 1000)} has changed: it is no longer used"
                self._own = None
                self._copy = SparseCopy(self._models, self._manifest)
            return self._own

    @property
    def manifest(self) -> Manifest | None:
        """None before the first `know`."""
        return self._manifest

    @property
    def own_path(self) -> Path | None:
        """The equal file that was found on this disk; None where the copy serves."""
        own = self._still_own()
        return None if own is None else own.paths[0]

    @property
    def missing_headers(self) -> tuple[int, ...]:
        """Files (numbers in Manifest.files) whose headers fetch_headers must get before `header` works."""
        own = self._still_own()
        return () if own is not None else self._known_copy().missing_headers

    def path(self) -> Path:
        """The model's first file, the own one or the copy's. Raises HomeinferError while headers are missing."""
        own = self._still_own()
        if own is None and self._known_copy().missing_headers:
            raise HomeinferError("the model's headers have not come yet")
        return own.paths[0] if own is not None else self._known_copy().path(0)

    def header(self) -> Header:
        """Without vocabulary; slow: read anew each time. Raises HomeinferError while headers are missing."""
        own = self._still_own()
        return read_header(own.paths[0], vocabulary=False) if own is not None else self._known_copy().header()

    def holds(self) -> tuple[int, ...]:
        """Tensors (numbers in Manifest.tensors) that are here and checked; those of an own file after `check`, in this
        run or an earlier one. None before the first `know`."""
        if self._manifest is None:
            return ()
        own = self._still_own()
        return tuple(sorted(own.tensors if own is not None else self._known_copy().tensors))

    def missing(self, tensors: Iterable[int]) -> tuple[int, ...]:
        """Those of these tensors that `holds` does not name."""
        return tuple(sorted(set(tensors) - set(self.holds())))

    def check(
        self,
        tensors: Iterable[int],
        on_progress: Callable[[float], None] = lambda _share: None,
        stopped: threading.Event | None = None,
    ) -> tuple[int, ...]:
        """Slow. Read these tensors of the own file where that was not done yet; when one is not the model's, the file
        is no longer used (see remark). Returns which are missing, to be fetched. on_progress: share 0 to 1, from any
        thread; stopped: end early. Raises HomeinferError when the file can't be read."""
        wanted = self._valid(tensors)
        own = self._still_own()
        if own is not None:
            all_tensors = self.known().tensors
            todo = wanted - own.tensors
            own.check(todo, Shares(sum(all_tensors[n].nbytes for n in todo), on_progress).add, stopped)
            with self._changing:
                if own.differs and self._own is own:
                    self._own = None
                    self._copy = SparseCopy(self._models, self.known())
                    self._differs(own)
        return self.missing(wanted)

    def make_room(self, tensors: Iterable[int], also_bytes: int = 0) -> None:
        """Raises HomeinferError when the disk has no room for what is missing of these tensors (and also_bytes, such as
        windows that will be cut on the same disk), even with older models removed."""
        missing = self._valid(tensors)
        own = self._still_own()
        needed = also_bytes + (0 if own is not None else self._known_copy().missing_bytes(missing))
        if needed:
            make_room(self._models, needed)

    def cut(self, windows: tuple[tuple[int, int], ...], folder: Path, progress: Progress | None = None) -> list[Path]:
        """Slow. window_file.cut_windows into `folder`, once it is sure that every tensor for them is here; the whole
        model is its own window. Raises HomeinferError."""
        from homeinfer.model.window_file import cut_windows  # an idle agent does without what writes files
        from homeinfer.model.window_plan import n_layers

        manifest, header = self.known(), self.header()
        needed = {n for first, last in windows for n in needed_tensors(header, manifest, first, last)}
        missing = self.missing(needed)
        if missing:
            raise HomeinferError(f"{len(missing)} of {len(needed)} tensors are not on this device yet")
        if self._copy is not None:
            self._copy.save()
        if windows == ((0, n_layers(header)),):
            return [Path(header.files[0].path)]
        return cut_windows(header, windows, folder, progress)

    def pieces(self, tensor: int) -> frozenset[int]:
        """Of an unfinished tensor, the numbers of the pieces (messages.PIECE_BYTES each) that are there."""
        return self._known_copy().pieces(tensor)

    def write_header(self, file: int, data: bytes) -> None:
        """Slow. Raises HomeinferError for another than the manifest's, or a full disk."""
        self._known_copy().write_header(file, data)

    def write(self, tensor: int, offset: int, data: bytes | memoryview) -> None:
        """Slow. A piece of a tensor, `offset` from its start. Raises HomeinferError for what is no piece, or a full
        disk."""
        self._known_copy().write(tensor, offset, data)

    def finish(self, tensor: int) -> bool:
        """Slow. All pieces are there: compare the digest; False: they don't count. Raises HomeinferError."""
        return self._known_copy().finish(tensor)

    def save(self) -> None:
        """Slow. What came so far stays even if the machine loses power now. Raises HomeinferError."""
        if self._copy is not None:
            self._copy.save()

    def read(self, digest: str, file: int, offset: int, nbytes: int) -> bytes | None:
        """Slow. Bytes for another device: inside a header or one tensor that is here and checked; None for all else."""
        manifest = self._manifest
        if manifest is None or digest != manifest.digest or not self._may_read(manifest, file, offset, nbytes):
            return None
        holder = self._own or self._copy
        try:
            return None if holder is None else holder.read(file, offset, nbytes)
        except OSError:
            return None

    def _may_read(self, manifest: Manifest, file: int, offset: int, nbytes: int) -> bool:
        if not 0 <= file < len(manifest.files) or offset < 0 or nbytes < 1:
            return False
        if offset + nbytes <= manifest.files[file].header_bytes:
            return self._own is not None or (self._copy is not None and file not in self._copy.missing_headers)
        at = bisect.bisect_right(self._by_offset, (file, offset, len(manifest.tensors))) - 1
        if at < 0:
            return False
        number = self._by_offset[at][2]
        tensor = manifest.tensors[number]
        holder = self._own or self._copy
        is_inside = tensor.file == file and tensor.offset <= offset and offset + nbytes <= tensor.offset + tensor.nbytes
        return is_inside and holder is not None and holder.has(number)

    def disk_free(self) -> int:
        """Bytes, for Holds.disk_free_bytes."""
        return free_bytes(self._folder)

    def close(self) -> None:
        """What is here is found again."""
        with self._changing:
            self._forget()

    def known(self) -> Manifest:
        """The cluster's model. Raises HomeinferError before the first `know`."""
        if self._manifest is None:
            raise HomeinferError("this device does not know the cluster's model yet")
        return self._manifest

    def _known_copy(self) -> SparseCopy:
        self.known()
        if self._copy is None:
            raise HomeinferError("the model's file is this device's own: nothing is written to it")
        return self._copy

    def _valid(self, tensors: Iterable[int]) -> set[int]:
        wanted = set(tensors)
        if not all(0 <= n < len(self.known().tensors) for n in wanted):
            raise HomeinferError("the head asks for weights that its model does not have")
        return wanted
