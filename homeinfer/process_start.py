"""When a process started: numbers of processes come again, so a number alone names none."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def process_start(pid: int | None = None) -> str:
    """Of a process, or of this one, in words that nothing but an equal start has. Raises psutil.NoSuchProcess.

    Linux counts from its own start; psutil says it as a time of day, which moves for all processes when the clock is
    set, as it is soon after the start of a machine without a battery for it.
    """
    number = os.getpid() if pid is None else pid
    if not sys.platform.startswith("linux"):
        return str(psutil.Process(number).create_time())
    try:
        said = Path(f"/proc/{number}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(number) from None
    boot = ""
    with contextlib.suppress(OSError):
        boot = _BOOT.read_text().strip()
    return f"{said.rpartition(')')[2].split()[19]} of {boot}"


def still_runs(pid: int, began: str) -> bool:
    """Whether the process with this number and process_start goes on; one that has ended and that its parent has not
    looked after does not."""
    try:
        return process_start(pid) == began and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False
