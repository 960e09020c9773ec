"""Small JSON files that only this user may read: replaced as a whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.folders import private_folder

_MOST_BYTES = 1 << 20
_T = TypeVar("_T")


def read_private(path: Path, kind: type[_T], what: str) -> _T | None:
    """What write_private wrote there, None where there is no file.

    A mode that lets others read or write is tightened. Raises HomeinferError, naming the file as `what`, when it is
    somebody else's, can't be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            _make_private(file.fileno(), path)
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise HomeinferError(
            f"{path}: {what} can't be read: {problem.strerror}; set HOMEINFER_STATE to another folder"
        ) from None
    if len(data) > _MOST_BYTES:
        raise HomeinferError(f"{path} is far too large for {what}; move it away and start again")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise HomeinferError(f"{path} is damaged ({problem}): this was {what}; move it away and start again") from None


def _make_private(handle: int, path: Path) -> None:
    if os.name != "posix":
        return
    info = os.fstat(handle)
    if info.st_uid != os.geteuid():
        raise HomeinferError(f"{path} belongs to another user; set HOMEINFER_STATE to a folder of your own")
    if stat.S_IMODE(info.st_mode) & 0o077:
        os.fchmod(handle, 0o600)


def write_private(path: Path, content: object, what: str) -> None:
    """Replace the file, mode 0600; its folder is made where it is missing. Raises HomeinferError."""
    _written(path, content, what, keeps=False)


def create_private(path: Path, content: object, what: str) -> bool:
    """Write the file unless there is one already; whether it was written. Of several processes that create it at the
    same time one does. Raises HomeinferError."""
    return _written(path, content, what, keeps=True)


def _written(path: Path, content: object, what: str, *, keeps: bool) -> bool:
    private_folder(path.parent)
    partial: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if keeps:
            return _placed(partial, path)
        partial.replace(path)
        return True
    except OSError as problem:
        raise HomeinferError(
            f"{path}: {what} can't be written: {problem.strerror}; make room or set HOMEINFER_STATE to another folder"
        ) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _placed(partial: Path, path: Path) -> bool:
    """Give a file its name unless the name is taken; without hard links two at once may both think that they did."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        return False
    except (OSError, NotImplementedError):
        if path.exists():
            return False
        partial.replace(path)
    return True
