"""A model's files as far as they came from other devices: same names, sizes and offsets as the originals, with holes
where nothing is needed here, so that whatever reads models reads these."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from homeinfer.cluster.weights.digests import range_digest
from homeinfer.cluster.weights.manifest import is_of
from homeinfer.cluster.weights.messages import PIECE_BYTES
from homeinfer.cluster.weights.room import Locked, make_sparse, too_little_room, used_now
from homeinfer.cluster.wire.control import Manifest
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable, read_header
from homeinfer.whole_file import whole_file

_FORMAT: Final = 1
_STATE: Final = "have.msgpack"
_FILES: Final = "files"
_SECOND_NS: Final = 1_000_000_000


class _Have(msgspec.Struct, frozen=True):
    """headers: files whose header is there. tensors: whole ones, their digests checked. pieces: of others, numbers of
    the pieces (of piece_bytes each) that came."""

    format: int
    piece_bytes: int
    headers: tuple[int, ...] = ()
    tensors: tuple[int, ...] = ()
    pieces: dict[int, tuple[int, ...]] = {}


def model_folder(models: Path, manifest: Manifest) -> Path:
    """Where the copy of this very model is: headers, names and every tensor's digest count."""
    return models / hashlib.sha256(msgspec.msgpack.encode(manifest)).hexdigest()[:32]


class SparseCopy:
    """The copy of one model, in this process's hands until closed. Methods may be called from several threads."""

    def __init__(self, models: Path, manifest: Manifest) -> None:
        """Raises HomeinferError when its folder can't be made, or another process has it."""
        self.folder = model_folder(models, manifest)
        self.manifest = manifest
        self._locked = Locked(self.folder)
        self._changing = threading.Lock()
        self._saving = threading.Lock()
        try:
            (self.folder / _FILES).mkdir(parents=True, exist_ok=True)
            is_mine = self._locked.take()
        except OSError as problem:
            raise HomeinferError(
                f"{models} can't hold weights ({problem.strerror}): set HOMEINFER_WEIGHTS to another folder"
            ) from None
        if not is_mine:
            raise HomeinferError(f"another homeinfer on this machine uses {models}: end it or set HOMEINFER_WEIGHTS")
        used_now(self.folder)
        for left_over in self.folder.glob(".*.partial"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        self._load()

    def _load(self) -> None:
        try:
            have = msgspec.msgpack.decode((self.folder / _STATE).read_bytes(), type=_Have)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            have = _Have(_FORMAT, PIECE_BYTES)
        usable = have.format == _FORMAT
        there = {n for n in have.headers if usable and n < len(self.manifest.files) and self._is_whole(n)}
        tensors = self.manifest.tensors
        self._headers = there
        self._tensors = {n for n in have.tensors if 0 <= n < len(tensors) and tensors[n].file in there}
        self._pieces = {
            n: set(pieces)
            for n, pieces in have.pieces.items()
            if have.piece_bytes == PIECE_BYTES and 0 <= n < len(tensors) and tensors[n].file in there
        }

    def _is_whole(self, file: int) -> bool:
        """Whether a file has its size and header: it may have been removed or swapped under the list."""
        wanted = self.manifest.files[file]
        try:
            path = self.path(file)
            return path.stat().st_size == wanted.nbytes and range_digest(path, (0, wanted.header_bytes)) == (
                wanted.digest
            )
        except OSError:
            return False

    def path(self, file: int) -> Path:
        return self.folder / _FILES / self.manifest.files[file].name

    @property
    def missing_headers(self) -> tuple[int, ...]:
        with self._changing:
            return tuple(n for n in range(len(self.manifest.files)) if n not in self._headers)

    @property
    def tensors(self) -> frozenset[int]:
        """Whole and checked."""
        with self._changing:
            return frozenset(self._tensors)

    def has(self, tensor: int) -> bool:
        """Whether this tensor is whole and checked."""
        return tensor in self._tensors

    def pieces(self, tensor: int) -> frozenset[int]:
        """Pieces of an unfinished tensor that came already."""
        with self._changing:
            return frozenset(self._pieces.get(tensor, ()))

    def write_header(self, file: int, data: bytes) -> None:
        """Make the file with this header and holes behind it. Raises HomeinferError for another header than the
        manifest's, and when it can't be written."""
        wanted = self.manifest.files[file]
        if len(data) != wanted.header_bytes or hashlib.sha256(data).hexdigest() != wanted.digest:
            raise HomeinferError(f"{printable(wanted.name)}: the header that came is not the model's")
        try:
            with self.path(file).open("wb") as target:
                make_sparse(target)
                target.write(data)
                target.truncate(wanted.nbytes)
                target.flush()
                os.fsync(target.fileno())
        except OSError as problem:
            raise self._cannot_write(problem, wanted.header_bytes) from None
        with self._changing:
            self._headers.add(file)
        self.save()

    def header(self) -> Header:
        """Without vocabulary; read anew each time. Raises HomeinferError when headers are missing, or tell of another
        model than the manifest."""
        if self.missing_headers:
            raise HomeinferError("the model's headers have not come yet")
        header = read_header(self.path(0), vocabulary=False)
        if not is_of(self.manifest, header):
            raise HomeinferError(
                "the cluster's model is described otherwise than its header: end homeinfer on the head, start again"
            )
        return header

    def write(self, tensor: int, offset: int, data: bytes | memoryview) -> None:
        """A piece of a tensor: offset from the tensor's start, a multiple of PIECE_BYTES. Raises HomeinferError for
        what is no piece of it, or when the disk is full."""
        wanted = self.manifest.tensors[tensor]
        if offset < 0 or offset % PIECE_BYTES or len(data) != min(PIECE_BYTES, wanted.nbytes - offset):
            raise HomeinferError(f"{printable(wanted.name)}: {len(data):,} bytes at {offset:,} are no piece of it")
        if wanted.file not in self._headers:
            raise HomeinferError("the model's headers have not come yet")
        if self.has(tensor):
            raise HomeinferError(f"{printable(wanted.name)} is here already and is not written again")
        try:
            with self.path(wanted.file).open("r+b", buffering=0) as target:
                target.seek(wanted.offset + offset)
                left = memoryview(data)
                while left:
                    left = left[target.write(left) :]
        except OSError as problem:
            raise self._cannot_write(problem, wanted.nbytes - offset) from None
        with self._changing:
            self._pieces.setdefault(tensor, set()).add(offset // PIECE_BYTES)

    def finish(self, tensor: int) -> bool:
        """Check a tensor whose pieces are all there. False: it was not the model's, and counts as not there. Raises
        HomeinferError when it can't be read."""
        wanted = self.manifest.tensors[tensor]
        try:
            is_right = range_digest(self.path(wanted.file), (wanted.offset, wanted.nbytes)) == wanted.digest
        except OSError as problem:
            raise self._cannot_write(problem, 0) from None
        with self._changing:
            self._pieces.pop(tensor, None)
            if is_right:
                self._tensors.add(tensor)
        return is_right

    def save(self) -> None:
        """Note on disk what is there, once it is really there. Raises HomeinferError when it can't be written."""
        with self._saving:
            with self._changing:
                headers, tensors = tuple(sorted(self._headers)), tuple(sorted(self._tensors))
                pieces = {n: tuple(sorted(those)) for n, those in self._pieces.items()}
            try:
                for file in headers:
                    self._sync(file)
                have = _Have(_FORMAT, PIECE_BYTES, headers, tensors, pieces)
                with whole_file(self.folder / _STATE) as state:
                    state.write(msgspec.msgpack.encode(have))
            except OSError as problem:
                raise self._cannot_write(problem, 0) from None

    def _sync(self, file: int) -> None:
        """And give the file the time of change that always is this model's: names of windows cut from it depend on
        it, and more tensors that come don't change them."""
        path = self.path(file)
        with path.open("r+b") as target:
            os.fsync(target.fileno())
        when = (1_000_000_000 + 2 * (int(self.folder.name[:7], 16))) * _SECOND_NS
        os.utime(path, ns=(when, when))

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """Raises OSError."""
        return read_at(self.path(file), offset, nbytes)

    def missing_bytes(self, tensors: Iterable[int]) -> int:
        """Of these tensors, what still has to come."""
        with self._changing:
            there: Mapping[int, int] = {n: len(those) * PIECE_BYTES for n, those in self._pieces.items()}
            missing = [n for n in set(tensors) if n not in self._tensors]
            return sum(max(0, self.manifest.tensors[n].nbytes - there.get(n, 0)) for n in missing)

    def close(self) -> None:
        """What is there stays there for the next time."""
        with contextlib.suppress(HomeinferError):
            self.save()
        used_now(self.folder)
        self._locked.close()

    def _cannot_write(self, problem: OSError, needed: int) -> HomeinferError:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            return too_little_room(self.folder.parent, needed)
        return HomeinferError(
            f"{self.folder}: weights can't be kept there ({problem.strerror or problem}): "
            "set HOMEINFER_WEIGHTS to another folder"
        )


def read_at(path: Path, offset: int, nbytes: int) -> bytes:
    """Raises OSError, also when the file ends early."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        data = file.read(nbytes)
        while data is not None and len(data) < nbytes:
            more = file.read(nbytes - len(data))
            if not more:
                break
            data += more
    if data is None or len(data) != nbytes:
        raise OSError(errno.EIO, "the file ends early")
    return data
