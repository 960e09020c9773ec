"""The head's own agent: a child process that is started again whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

import homeinfer
from homeinfer.cluster.agent_options import AgentOptions, AgentStart, Ended
from homeinfer.errors import HomeinferError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_HOPELESS, _SHORT_SECONDS = 5, 20.0
"""So many lives, each shorter than this and ended by itself, and it will not come up."""
_END_SECONDS = 8.0


class OwnAgent:
    """on_end(why) is called at each unwanted end."""

    def __init__(self, options: AgentOptions, on_end: Callable[[str], None]) -> None:
        self._options, self._on_end = options, on_end
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Until cancelled. Raises HomeinferError when it does not come up again and again."""
        pause, short = _FIRST_PAUSE, 0
        while True:
            began = time.monotonic()
            status, why = await self._live()
            is_short = status >= 0 and time.monotonic() - began < _SHORT_SECONDS
            short = short + 1 if is_short else 0
            if short >= _HOPELESS:
                raise HomeinferError(f"the head's own agent does not stay up: {why}")
            self._on_end(why)
            pause = min(pause * 2, _LONGEST_PAUSE) if short else _FIRST_PAUSE
            await asyncio.sleep(pause)

    async def _live(self) -> tuple[int, str]:
        """One life of it: its exit status (below 0: killed by that signal), and why it ended."""
        paths = [str(Path(homeinfer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "homeinfer.cluster.agent",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # a Ctrl-C in the terminal is the coordinator's to deal with
        )
        assert process.stdin is not None
        said: list[bytes] = []
        listening = asyncio.create_task(_last_words(process, said))
        try:
            with contextlib.suppress(ConnectionError):
                process.stdin.write(msgspec.json.encode(AgentStart(self._options)) + b"\n")
                await process.stdin.drain()
            assert process.stdout is not None
            line = await process.stdout.readline()
            status = await process.wait()
            await listening
            return status, _why(line, status, said)
        finally:
            listening.cancel()
            await asyncio.shield(self._end(process))

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Let it end by itself: it takes its engine with it."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _END_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _last_words(process: asyncio.subprocess.Process, said: list[bytes]) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        if line.strip():
            said[:] = [*said[-9:], line.strip()]


def _why(line: bytes, status: int, said: list[bytes]) -> str:
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.json.decode(line, type=Ended).reason
    last = said[-1].decode("utf-8", "replace")[:300] if said else ""
    return last or (f"killed by signal {-status}" if status < 0 else f"exit code {status}")
