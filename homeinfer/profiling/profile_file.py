"""Write a profile file, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from homeinfer.cluster.plan_files import check_writable, write_text
from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable


def check_destination(path: Path) -> None:
    """Raise HomeinferError, before a minute is spent, where `write_profile` would."""
    check_writable(path)
    if not os.access(path.parent, os.W_OK):
        raise HomeinferError(f"{printable(str(path), 1000)}: its folder can't be written; choose another one")


def write_profile(path: Path, data: bytes) -> None:
    """data: JSON. Raises HomeinferError when it can't be written; nothing stays then."""
    write_text(path, f"{data.decode()}\n")
