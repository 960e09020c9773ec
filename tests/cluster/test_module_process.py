"""Processes of homeinfer's own modules: what they say last is heard, and they end."""

from __future__ import annotations

import asyncio
import sys

from homeinfer.cluster.module_process import keep_last_lines, last_line, let_end

TALKATIVE = """
import sys
for n in range(100):
    print("line", n, file=sys.stderr)
sys.stderr.write("x" * 2_000_000)
sys.stderr.write("\\nlast words")
sys.stderr.flush()
sys.stdin.read()
"""


def test_a_line_without_end_stops_neither_the_process_nor_what_it_says_last() -> None:
    async def test() -> None:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", TALKATIVE, stdin=pipe, stdout=pipe, stderr=pipe
        )
        said: list[bytes] = []
        listening = asyncio.create_task(keep_last_lines(process, said))
        while sum(map(len, said)) < 1 << 16:
            await asyncio.sleep(0.01)
        await let_end(process, 30)
        await listening
        assert process.returncode == 0
        assert last_line(said) == "last words"
        assert b"line 99" in said
        assert sum(map(len, said)) < 1 << 17

    asyncio.run(asyncio.wait_for(test(), 60))
