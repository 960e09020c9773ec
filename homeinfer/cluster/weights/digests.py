"""SHA-256 of parts of files, remembered for as long as a file stays as it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable
from homeinfer.whole_file import whole_file

Range = tuple[int, int]
"""Offset and length in a file, bytes."""

_BLOCK: Final = 1 << 20
_MOST_THREADS: Final = 4
_MOST_FILES: Final = 200
_FORMAT: Final = 1


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """What changes when a file does."""

    nbytes: int
    mtime_ns: int
    ctime_ns: int


class _Remembered(msgspec.Struct, frozen=True):
    format: int
    path: str
    stamp: Stamp
    digests: dict[Range, str]


def stamp_of(path: Path) -> Stamp:
    """Raises OSError when the file is gone."""
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class FileDigests:
    """What is known of files, one small file each in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def known(self, path: Path) -> Mapping[Range, str]:
        """Digests of the file as it is now, from earlier runs; nothing where it has changed or is gone."""
        try:
            stamp = stamp_of(path)
            found = msgspec.msgpack.decode(self._entry(path).read_bytes(), type=_Remembered)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return {}
        is_same = (found.format, found.path, found.stamp) == (_FORMAT, _name(path), stamp)
        return found.digests if is_same else {}

    def compute(
        self,
        path: Path,
        ranges: Iterable[Range],
        on_bytes: Callable[[int], None] = lambda _n: None,
        stopped: threading.Event | None = None,
    ) -> Mapping[Range, str]:
        """Digests of these ranges, read where they are not known; on_bytes gets the bytes done since its last call,
        from several threads. When `stopped` is set it ends early with what it has.

        Raises HomeinferError when the file can't be read, ends early, or changes meanwhile.
        """
        known = dict(self.known(path))
        wanted = list(dict.fromkeys(ranges))
        missing = [one for one in wanted if one not in known]
        on_bytes(sum(nbytes for _, nbytes in wanted) - sum(nbytes for _, nbytes in missing))
        if missing:
            known |= self._read(path, missing, on_bytes, stopped or threading.Event())
        return {one: known[one] for one in wanted if one in known}

    def _read(
        self, path: Path, ranges: Sequence[Range], on_bytes: Callable[[int], None], stopped: threading.Event
    ) -> Mapping[Range, str]:
        ending = threading.Event()
        found: dict[Range, str] = {}
        try:
            stamp = stamp_of(path)
            try:
                digest = partial(_digest, path, lambda: stopped.is_set() or ending.is_set(), on_bytes)
                with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
                    try:
                        for one, text in zip(ranges, pool.map(digest, ranges), strict=True):
                            if text is not None:
                                found[one] = text
                    finally:
                        ending.set()  # Ctrl-C must not wait for the rest of a large file
                        pool.shutdown(cancel_futures=True)
            finally:
                if stamp_of(path) == stamp:
                    self._remember(path, stamp, found)
            if stamp_of(path) != stamp:
                raise HomeinferError(f"{printable(str(path), 1000)} was changed while it was read: try again")
        except OSError as problem:
            raise HomeinferError(
                f"{printable(str(path), 1000)} can't be read any more: {problem.strerror or problem}; check the path"
            ) from None
        return found

    def _remember(self, path: Path, stamp: Stamp, found: Mapping[Range, str]) -> None:
        """Only saves time later, so that a full disk is no problem of anybody's."""
        entry = self._entry(path)
        said = _Remembered(_FORMAT, _name(path), stamp, {**self.known(path), **found})
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(entry) as file:
                file.write(msgspec.msgpack.encode(said))
            for old in sorted(entry.parent.iterdir(), key=lambda one: one.stat().st_mtime_ns)[:-_MOST_FILES]:
                old.unlink(missing_ok=True)

    def _entry(self, path: Path) -> Path:
        return self._folder / f"{hashlib.sha256(_name(path).encode()).hexdigest()[:32]}.msgpack"


def range_digest(path: Path, part: Range) -> str:
    """SHA-256 of a part of a file. Raises OSError, also when the file ends early."""
    text = _digest(path, lambda: False, lambda _n: None, part)
    assert text is not None
    return text


def _digest(path: Path, is_stopped: Callable[[], bool], on_bytes: Callable[[int], None], part: Range) -> str | None:
    offset, left = part
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(_BLOCK, left)))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left:
            n = file.readinto(block[: min(len(block), left)])
            if is_stopped():
                return None
            if not n:
                raise OSError("the file ends early")
            digest.update(block[:n])
            left -= n
            on_bytes(n)
    return digest.hexdigest()


def _name(path: Path) -> str:
    return printable(os.path.realpath(path), 4000)
