"""`homeinfer cluster leave`, and the note by which it finds what runs here for a cluster."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from homeinfer.cli.ui import console, notes
from homeinfer.cluster.coordinator.running import run_folder, running_cluster
from homeinfer.cluster.known_heads import KnownHead, forget_head, known_heads
from homeinfer.cluster.private_file import write_private
from homeinfer.errors import HomeinferError
from homeinfer.folders import private_folder, state_folder
from homeinfer.process_start import process_start, still_runs

_FILE = "joined.json"
_END_SECONDS = 30.0
_SILENT_SECONDS = 1.5


class Joined(msgspec.Struct, frozen=True):
    """The process that takes part, and in whose cluster. began: its process_start."""

    pid: int
    began: str
    head: str


@contextlib.contextmanager
def joined(folder: Path, known: KnownHead) -> Iterator[None]:
    """Says meanwhile that this process takes part. Raises HomeinferError when another one does already."""
    check_free(folder)
    path = private_folder(run_folder(folder)) / _FILE
    mine = Joined(os.getpid(), process_start(), known.key)
    write_private(path, mine, "the note of what takes part")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Raises HomeinferError when this machine takes part in a cluster already, as its head or otherwise."""
    cluster = running_cluster(folder)
    if cluster is not None:
        raise HomeinferError(
            f"this machine is the head of a cluster that runs, process {cluster.pid}: "
            "to join another one, end it with homeinfer cluster down"
        )
    check_not_joined(folder)


def check_not_joined(folder: Path) -> None:
    """Raises HomeinferError when this machine takes part in another one's cluster."""
    other = joined_now(folder)
    if other is not None:
        raise HomeinferError(
            f"this machine takes part in a cluster already, process {other.pid}: press Ctrl-C there first"
        )


def joined_now(folder: Path) -> Joined | None:
    """The process that takes part, None when there is none."""
    try:
        found = msgspec.json.decode((run_folder(folder) / _FILE).read_bytes(), type=Joined)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return found if still_runs(found.pid, found.began) else None


def joined_head(folder: Path) -> str | None:
    """The name of the head in whose cluster this machine takes part now, None when it does in none."""
    running = joined_now(folder)
    names = [head.name for head in known_heads(folder) if running is not None and head.key == running.head]
    return names[0] if names else None


def leave_for_good(name: str) -> None:
    """Raises HomeinferError when there is nothing to leave, or when it can't be told which head."""
    folder = state_folder()
    head = _which(known_heads(folder), name)
    running = joined_now(folder)
    if running is not None and running.head == head.key:
        _end(running)
    forget_head(folder, head.key)
    console.print(
        f"left, and {head.name} is forgotten here; there, homeinfer cluster forget takes this machine off the list",
        markup=False,
        soft_wrap=True,
    )


def _which(heads: tuple[KnownHead, ...], name: str) -> KnownHead:
    found = [head for head in heads if not name or head.name == name]
    names = ", ".join(head.name for head in heads)
    if not heads:
        raise HomeinferError("this machine is in no cluster: there is nothing to leave")
    if not found:
        raise HomeinferError(f"no head named {name} is known here; known are: {names}")
    if len(found) > 1:
        raise HomeinferError(f"this machine knows several heads: say which with --head: {names}")
    return found[0]


def _end(running: Joined) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(running.pid).terminate()
    if not has_ended(running.pid, running.began, _SILENT_SECONDS):
        notes.print("ending what runs here for the cluster")
    if not has_ended(running.pid, running.began, _END_SECONDS):
        raise HomeinferError(
            f"process {running.pid} takes part for this machine and does not end: end it and try again"
        )


def has_ended(pid: int, began: str, seconds: float) -> bool:
    """Whether a process ends within so many seconds; one that its parent has not looked after counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not still_runs(pid, began):
            return True
        time.sleep(0.05)
    return False
