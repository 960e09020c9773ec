"""Modules of homeinfer that run as processes of their own beside an asyncio program: started, listened to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import homeinfer
from homeinfer.errors import HomeinferError

_LAST_LINES = 10
_MOST_AT_ONCE = 1 << 16


async def start_module(
    module: str, environment: Mapping[str, str] = os.environ, most_line: int = 1 << 16
) -> asyncio.subprocess.Process:
    """`python -m module` with pipes for all three streams, whose lines have at most `most_line` bytes. Raises
    HomeinferError when the system has no room for another process."""
    # -P with the package's own folder: what lies in the working directory must not be imported
    paths = [str(Path(homeinfer.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=most_line,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # a Ctrl-C in the terminal is its starter's to deal with
        )
    except OSError as problem:
        raise HomeinferError(
            f"{module} can't be started: {problem.strerror or problem}; close other programs"
        ) from None


async def give_line(process: asyncio.subprocess.Process, line: bytes) -> None:
    """Write a line to its standard input; one that has ended already says by its end why."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(line + b"\n")
        await process.stdin.drain()


async def keep_last_lines(process: asyncio.subprocess.Process, said: list[bytes]) -> None:
    """Have in `said` the last lines of its standard error, until that is closed."""
    assert process.stderr is not None
    rest = b""
    while chunk := await process.stderr.read(_MOST_AT_ONCE):  # not by lines: an endless one must not end the reading,
        *lines, rest = (rest + chunk).split(b"\n")  # for which the process would wait, and its end would not be seen
        rest = rest[-_MOST_AT_ONCE:]
        said[:] = [*said, *(line.strip() for line in lines if line.strip())][-_LAST_LINES:]
    said[:] = [*said, *filter(None, [rest.strip()])][-_LAST_LINES:]


def last_line(said: list[bytes]) -> str:
    """The last of them, "" for none."""
    return said[-1].decode("utf-8", "replace")[:500] if said else ""


async def let_end(process: asyncio.subprocess.Process, seconds: float) -> None:
    """Close its standard input and wait: it has so long to clean up before it is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
