"""Huge pages are asked for where they cost little: in large blocks of memory that belong to no file."""

from __future__ import annotations

import mmap
import sys

from homeinfer.engine.huge_pages import LEAST_BYTES, ask_for_huge_pages, blocks_now, large_blocks, new_blocks

MAPS = """\
55e000000000-55e002000000 r--p 00000000 08:01 77    /usr/bin/python
7f0000001000-7f0003000000 rw-p 00000000 00:00 0
7f0010000000-7f0010800000 rw-p 00000000 00:00 0
7f0020000000-7f0024000000 rw-s 00000000 00:01 5     /dev/zero (deleted)
7f0030000000-7f0034000000 rw-p 00000000 08:01 78    /home/model.gguf
7f0040000000-7f0044000000 rw-p 00000000 00:00 0     [heap]
7f0050000000-7f0054000000 ---p 00000000 00:00 0
"""


def test_only_large_private_blocks_of_no_file_count_and_whole_huge_pages_of_them() -> None:
    assert list(large_blocks(MAPS)) == [(0x7F0000200000, 0x7F0003000000 - 0x7F0000200000)]


def test_blocks_that_were_there_before_are_left_out_also_where_new_ones_have_joined_them() -> None:
    mb = 1 << 20
    before = [(200 * mb, 40 * mb), (400 * mb, 20 * mb)]
    after = [(100 * mb, 20 * mb), (180 * mb, 100 * mb), (400 * mb, 20 * mb)]
    assert list(new_blocks(before, after, 20 * mb)) == [(100 * mb, 20 * mb), (180 * mb, 20 * mb), (240 * mb, 40 * mb)]
    assert list(new_blocks(before, after, 30 * mb)) == [(240 * mb, 40 * mb)]
    assert list(new_blocks((), after, mb)) == after


def test_a_large_block_of_this_process_is_asked_for_on_linux() -> None:
    if sys.platform != "linux":
        assert ask_for_huge_pages() == 0
        return
    before = blocks_now()
    with mmap.mmap(-1, 4 * LEAST_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        assert ask_for_huge_pages(before) >= (3 * LEAST_BYTES if takes_huge_pages(block) else 0)


def takes_huge_pages(block: mmap.mmap) -> bool:
    """Whether this kernel was built with them."""
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return False
    return True
