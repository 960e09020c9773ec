"""Huge pages are asked for where they cost little: in large blocks of memory that belong to no file."""

from __future__ import annotations

import sys

from homeinfer.engine.huge_pages import LEAST_BYTES, ask_for_huge_pages, large_blocks

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


def test_a_large_block_of_this_process_is_asked_for_on_linux() -> None:
    before = ask_for_huge_pages()
    block = bytearray(4 * LEAST_BYTES)
    more = ask_for_huge_pages() - before
    assert len(block) == 4 * LEAST_BYTES  # it is still there
    assert more >= 3 * LEAST_BYTES if sys.platform == "linux" else more == 0
