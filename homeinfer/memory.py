"""Giving memory back to the system that a process needed only for a moment."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """After something large was dropped: glibc keeps freed memory for later otherwise. Elsewhere than on Linux with
    glibc only Python's own garbage is collected."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
