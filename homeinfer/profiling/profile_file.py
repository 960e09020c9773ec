"""Write a profile file, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable


def check_destination(path: Path) -> None:
    """Raise HomeinferError, before a minute is spent, where `write_profile` would."""
    name = printable(str(path), 1000)
    if path.is_dir():
        raise HomeinferError(f"{name}: this is a folder; name a file, such as {printable(path.name, 60)}/laptop.json")
    if not path.parent.is_dir():
        raise HomeinferError(f"{name}: its folder does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise HomeinferError(f"{name}: its folder can't be written; choose another one")


def write_profile(path: Path, data: bytes) -> None:
    """Raises HomeinferError when it can't be written; nothing stays then."""
    partial = path.with_name(f".homeinfer-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        raise HomeinferError(
            f"{printable(str(path), 1000)}: the profile can't be written: {problem.strerror or problem}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
