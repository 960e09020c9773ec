"""Engine processes as a test meets them: found, killed, gone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

ENDLESS = ("-p", "1, 2, 3, 4, 5, 6,", "--raw", "--temp", "0", "-n", "4000")
"""Options of `homeinfer run` for an answer that surely goes on: SmolLM2 counts, and nothing is drawn by lot."""


def engines(pid: int | None = None) -> list[psutil.Process]:
    """The engine processes that this process, or the one with this pid, has started, in that order."""
    children = psutil.Process(os.getpid() if pid is None else pid).children()
    found = [c for c in children if c.status() != psutil.STATUS_ZOMBIE and "homeinfer.cluster.engine" in c.cmdline()]
    return sorted(found, key=lambda child: (child.create_time(), child.pid))


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Look again and again; AssertionError when it does not become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true after {seconds:.0f} seconds"
        time.sleep(0.02)
