"""One agent per state folder: two with the same keys would drive each other out at the head."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from homeinfer.errors import HomeinferError
from homeinfer.folders import private_folder

_FILE = "agent.pid"
_LOOK_SECONDS = 0.1


@contextlib.asynccontextmanager
async def only_agent(state: Path, patience: float, stopping: asyncio.Event) -> AsyncIterator[None]:
    """While this is open, no other agent runs with this state folder. Raises HomeinferError when one still does after
    `patience` seconds, or when this one is `stopping`."""
    path = private_folder(state) / _FILE
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
    except OSError as problem:
        raise HomeinferError(f"{path} can't be written: {problem.strerror}") from None
    with file:
        deadline = time.monotonic() + patience
        while not _lock(file):
            if time.monotonic() < deadline and not stopping.is_set():
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            pid = running_agent(state)
            raise HomeinferError(
                f"this device takes part in a cluster already (process {pid or 'unknown'}): leave it first "
                "(`homeinfer cluster leave`), or set HOMEINFER_STATE to another folder"
            )
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def running_agent(state: Path) -> int | None:
    """The process of the agent that runs with this state folder, None when there is none."""
    with contextlib.suppress(OSError, ValueError), (state / _FILE).open("r+") as file:
        pid = int(file.read())
        if not _lock(file):
            return pid
    return None


if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 20
    """Locked bytes can't be read by others: beyond the number."""

    def _lock(file: IO[str]) -> bool:
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            file.seek(0)
        return True

else:
    import fcntl

    def _lock(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
