"""Window files of a device: those of the plans before go."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path

import msgspec

KEPT_PARTS = 2
_LEFT_OVER_SECONDS = 3600.0
"""A partial file that nobody has written to for so long belongs to a process that was killed."""


class WindowFile(msgspec.Struct, frozen=True):
    """used: when it was last part of a plan, seconds."""

    path: str
    used: float


def unused(files: Collection[WindowFile], needed: Collection[str], kept: int = KEPT_PARTS) -> tuple[str, ...]:
    """Which window files may go: all but those needed now and as many again of those used last, since a device that
    comes back brings the plan before back as well."""
    others = sorted((file for file in files if file.path not in needed), key=lambda file: -file.used)
    return tuple(file.path for file in others[len(needed) * (kept - 1) :])


def remove_unused(folder: Path, needed: Collection[str], kept: int = KEPT_PARTS) -> None:
    """Remove them, and what killed processes left; mark those that are needed as used now."""
    for path in needed:
        with contextlib.suppress(OSError):
            if Path(path).parent == folder:
                _touch(Path(path))
    with contextlib.suppress(OSError):
        files = [WindowFile(str(path), path.stat().st_atime) for path in folder.glob("*.gguf")]
        partial = [
            str(path) for path in folder.glob(".*.part") if time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS
        ]
        for name in (*unused(files, needed, kept), *partial):
            Path(name).unlink(missing_ok=True)


def _touch(path: Path) -> None:
    """Only the time of access: the other one says which model a window is of."""
    info = path.stat()
    os.utime(path, ns=(time.time_ns(), info.st_mtime_ns))
