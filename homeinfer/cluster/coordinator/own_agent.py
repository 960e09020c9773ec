"""The head's own agent: a child process that is started again whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable

import msgspec

from homeinfer.cluster.agent_options import AgentOptions, AgentStart, Ended
from homeinfer.cluster.agent_tasks import to_the_end
from homeinfer.cluster.module_process import give_line, keep_last_lines, last_line, let_end, start_module
from homeinfer.errors import HomeinferError

_MODULE = "homeinfer.cluster.agent"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_HOPELESS, _SHORT_SECONDS = 5, 20.0
_END_SECONDS = 8.0


class Lives(msgspec.Struct, frozen=True):
    """Its short lives since the last long one. failures: those of them that nobody else ended."""

    short: int = 0
    failures: int = 0

    def after(self, seconds: float, status: int) -> Lives:
        """With one more, that took so long and ended with this exit status (below 0: by that signal)."""
        if seconds >= _SHORT_SECONDS:
            return Lives()
        return Lives(self.short + 1, self.failures + (not _is_killed(status)))

    @property
    def is_hopeless(self) -> bool:
        return self.failures >= _HOPELESS

    @property
    def pause(self) -> float:
        """Seconds before the next."""
        return min(_FIRST_PAUSE * 2.0 ** min(self.short, 10), _LONGEST_PAUSE)


def _is_killed(status: int) -> bool:
    """Whether someone else, or the system for want of memory, ended a process."""
    return -status in {getattr(signal, name, None) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}


class OwnAgent:
    """on_end(why) is called at each unwanted end."""

    def __init__(self, options: AgentOptions, on_end: Callable[[str], None]) -> None:
        self._options, self._on_end = options, on_end

    async def run(self) -> None:
        """Until cancelled. Raises HomeinferError when it does not come up again and again."""
        lives = Lives()
        while True:
            began = time.monotonic()
            try:
                status, why = await self._live()
            except HomeinferError as problem:
                status, why = 1, str(problem)
            lives = lives.after(time.monotonic() - began, status)
            if lives.is_hopeless:
                raise HomeinferError(f"the head's own agent does not stay up: {why}")
            self._on_end(why)
            await asyncio.sleep(lives.pause)

    async def _live(self) -> tuple[int, str]:
        """One life of it: its exit status (below 0: ended by that signal), and why it ended. Cancelled, it has time to
        end its engine. Raises HomeinferError when it can't be started."""
        process = await start_module(_MODULE)
        said: list[bytes] = []
        listening = asyncio.create_task(keep_last_lines(process, said))
        try:
            await give_line(process, msgspec.json.encode(AgentStart(self._options)))
            assert process.stdout is not None
            line = await process.stdout.readline()
            status = await process.wait()
            await listening
            return status, _why(line, status, said)
        finally:
            await to_the_end(let_end(process, _END_SECONDS))
            listening.cancel()


def _why(line: bytes, status: int, said: list[bytes]) -> str:
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.json.decode(line, type=Ended).reason
    return last_line(said) or (f"killed by signal {-status}" if status < 0 else f"exit code {status}")
