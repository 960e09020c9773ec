"""Huge pages for weights, of which each decode step looks up the addresses of all.

Only whole huge pages inside large blocks of memory, so that a device short of memory loses nothing by it. Not all that
malloc gives (glibc.malloc.hugetlb): of a context's buffers a step touches a little here and there, each a huge page.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

Block = tuple[int, int]
"""Address and bytes."""

LEAST_BYTES = 16 << 20
_PAGE = 2 << 20


def large_blocks(maps: str, least: int = LEAST_BYTES) -> Iterator[Block]:
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


def blocks_now() -> tuple[Block, ...]:
    """This process's large blocks; none where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        return tuple(large_blocks(Path("/proc/self/maps").read_text()))
    return ()


def new_blocks(before: Sequence[Block], after: Sequence[Block], least: int = LEAST_BYTES) -> Iterator[Block]:
    """What of `after` was not there before, where it is that large: the system joins neighbours to one block."""
    for address, size in after:
        start, end = address, address + size
        for old, old_size in sorted(before):
            if old + old_size <= start or old >= end:
                continue
            if old - start >= least:
                yield start, old - start
            start = old + old_size
        if end - start >= least:
            yield start, end - start


def ask_for_huge_pages(before: Sequence[Block] = ()) -> int:
    """Ask the system for huge pages in this process's large blocks, where they are not in use yet. Call it when a
    model's buffers are made and not filled. before: blocks that are something else's. Returns the bytes asked for; 0
    where there is nothing like it."""
    if sys.platform != "linux":
        return 0
    asked = 0
    with contextlib.suppress(OSError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for address, size in new_blocks(before, blocks_now()):
            asked += size if madvise(address, size, mmap.MADV_HUGEPAGE) == 0 else 0
    return asked
