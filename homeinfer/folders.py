"""Where homeinfer keeps things between runs, and how much room is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

import platformdirs

from homeinfer.errors import HomeinferError


def state_folder() -> Path:
    """Keys, members, what a running cluster says of itself: `HOMEINFER_STATE`, or the user's state folder."""
    named = os.environ.get("HOMEINFER_STATE")
    return Path(named) if named else Path(platformdirs.user_state_dir("homeinfer"))


def weights_folder() -> Path:
    """Parts of models that came from other devices: `HOMEINFER_WEIGHTS`, or weights/ in the user's cache folder."""
    named = os.environ.get("HOMEINFER_WEIGHTS")
    return Path(named) if named else Path(platformdirs.user_cache_dir("homeinfer")) / "weights"


def windows_folder() -> Path:
    """Window files: `HOMEINFER_WINDOWS`, or windows/ in the user's cache folder."""
    named = os.environ.get("HOMEINFER_WINDOWS")
    return Path(named) if named else Path(platformdirs.user_cache_dir("homeinfer")) / "windows"


def private_folder(folder: Path) -> Path:
    """The folder, made where it is missing, which nobody but this user may enter.

    Raises HomeinferError when it can't be made so.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.name == "posix" and stat.S_IMODE(folder.stat().st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError as problem:
        raise HomeinferError(
            f"{folder} can't be made private ({problem.strerror}): set HOMEINFER_STATE to another folder"
        ) from None
    return folder


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder is on, or would be; 0 where the system doesn't say."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0
