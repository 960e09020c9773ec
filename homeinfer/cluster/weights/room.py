"""Room on the disk for weights, and folders of which only one process at a time may make use."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import IO, Final

from homeinfer.errors import HomeinferError
from homeinfer.folders import free_bytes

RESERVE_BYTES: Final = 256 << 20
"""What weights leave free on a disk for everything else."""
_LOCK: Final = "lock"


def too_little_room(folder: Path, needed: int) -> HomeinferError:
    """The error for a disk that is full, or would be; needed: bytes."""
    free, kept = free_bytes(folder) / 1e6, RESERVE_BYTES / 1e6
    return HomeinferError(
        f"the model's weights need {needed / 1e6:,.0f} MB more in {folder}, where {free:,.0f} MB are free and "
        f"{kept:,.0f} MB stay so: make room there or set HOMEINFER_WEIGHTS to another folder"
    )


def make_room(models: Path, needed: int) -> None:
    """Remove models in the folder `models`, those used longest ago first and none that a process has locked, until
    `needed` bytes and the reserve are free. Raises HomeinferError when that is not enough: nothing is removed then
    that would not have helped."""
    wanted = needed + RESERVE_BYTES
    if free_bytes(models) >= wanted:
        return
    unused = _unused(models)
    if free_bytes(models) + sum(_held_bytes(folder) for folder in unused) < wanted:
        raise too_little_room(models, needed)
    for folder in unused:
        if free_bytes(models) >= wanted:
            return
        with Locked(folder) as is_mine:
            if is_mine:
                shutil.rmtree(folder, ignore_errors=True)
    if free_bytes(models) < wanted:
        raise too_little_room(models, needed)


def _unused(models: Path) -> list[Path]:
    """Folders of models that nobody has locked, the one used longest ago first."""
    found = []
    with contextlib.suppress(OSError):
        for folder in models.iterdir():
            if folder.is_dir() and not folder.is_symlink():
                with Locked(folder) as is_mine:
                    if is_mine:
                        found.append((folder.stat().st_mtime_ns, folder))
    return [folder for _, folder in sorted(found)]


def _held_bytes(folder: Path) -> int:
    """What is really on the disk of its files, holes left out."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found = path.stat()
            total += found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size
    return total


class Locked:
    """A folder's lock, for as long as the process lives or until closed. As a context: whether it was to be had."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def take(self) -> bool:
        """False when another has it. Raises OSError where the lock's file can't be made."""
        file = (self._folder / _LOCK).open("ab")
        if not _lock(file):
            file.close()
            return False
        self._file = file
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> bool:
        try:
            return self.take()
        except OSError:
            return False

    def __exit__(self, *_: object) -> None:
        self.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def make_sparse(file: IO[bytes]) -> None:
        """Holes are not given by themselves on NTFS (FSCTL_SET_SPARSE)."""
        import ctypes

        done = ctypes.c_ulong()
        handle = msvcrt.get_osfhandle(file.fileno())
        ctypes.windll.kernel32.DeviceIoControl(
            ctypes.c_void_p(handle), 0x000900C4, None, 0, None, 0, ctypes.byref(done), None
        )

else:
    import fcntl

    def _lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def make_sparse(_file: IO[bytes]) -> None:
        """Holes come by themselves."""


def used_now(folder: Path) -> None:
    """This model was used later than others."""
    with contextlib.suppress(OSError):
        os.utime(folder)
