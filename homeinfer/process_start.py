"""When a process started: numbers of processes come again, so a number alone names none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil


def process_start(pid: int | None = None) -> float:
    """Of a process, or of this one: seconds on a clock that nobody sets. Raises psutil.NoSuchProcess.

    Linux counts from its own start; psutil says it as a time of day, which moves for all processes when the clock is
    set, as it is soon after the start of a machine without a battery for it.
    """
    number = os.getpid() if pid is None else pid
    if not sys.platform.startswith("linux"):
        return float(psutil.Process(number).create_time())
    try:
        said = Path(f"/proc/{number}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(number) from None
    return int(said.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
