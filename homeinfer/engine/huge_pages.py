"""Huge pages for weights, where addresses are looked up faster (runtime.engine_environment says by how much).

Only whole huge pages inside large blocks of memory, so that a device short of memory loses nothing by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

LEAST_BYTES = 16 << 20
_PAGE = 2 << 20


def large_blocks(maps: str, least: int = LEAST_BYTES) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the private, writable blocks of at least so many bytes that belong to no file, from the text
    of /proc/PID/maps; both multiples of a huge page, inside the block."""
    for line in maps.splitlines():
        words = line.split()
        if len(words) != 5 or words[1] != "rw-p":
            continue
        start, end = (int(number, 16) for number in words[0].split("-"))
        start, end = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if end - start >= least:
            yield start, end - start


def ask_for_huge_pages() -> int:
    """Ask the system for huge pages in this process's large blocks, where they are not in use yet. Call it when a
    model's buffers are made and not filled. Returns the bytes asked for; 0 where there is nothing like it."""
    if sys.platform != "linux":
        return 0
    asked = 0
    with contextlib.suppress(OSError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for address, size in large_blocks(Path("/proc/self/maps").read_text()):
            asked += size if madvise(address, size, mmap.MADV_HUGEPAGE) == 0 else 0
    return asked
