"""An agent's slow work, in processes that end with it: started, followed, and ended when nobody wants it any more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping

import msgspec
import psutil

from homeinfer.cluster.agent_jobs import FromJob, Job, Opened, Result, Share, Unable
from homeinfer.cluster.agent_tasks import to_the_end
from homeinfer.cluster.module_process import give_line, keep_last_lines, last_line, let_end, start_module
from homeinfer.errors import HomeinferError

_MODULE = "homeinfer.cluster.agent_worker"
_WHAT = "the process that works for this device"
_MOST_LINE = 64 << 20
_END_SECONDS = 5.0
"""A process that is told to end gets so long to remove what it was writing."""

OnNote = Callable[[Share | Opened], None]

_under_way: set[int] = set()
"""Process ids."""


async def work(job: Job, on_note: OnNote = lambda _note: None, environment: Mapping[str, str] = os.environ) -> Result:
    """Let a process do a job; cancelling ends it. Raises HomeinferError that says why it could not be done."""
    process = await start_module(_MODULE, environment, _MOST_LINE)
    _under_way.add(process.pid)
    said: list[bytes] = []
    listening = asyncio.create_task(keep_last_lines(process, said))
    try:
        await give_line(process, msgspec.json.encode(job))
        result = await _followed(process, on_note)
        if result is None:
            status = await process.wait()
            await listening
            raise HomeinferError(_death(status, said))
        return result
    finally:
        await to_the_end(let_end(process, _END_SECONDS))
        _under_way.discard(process.pid)
        listening.cancel()


def working_bytes() -> int:
    """Memory that the processes now at work, and those that they started, have for themselves and soon give back."""
    found = 0
    for pid in tuple(_under_way):
        with contextlib.suppress(psutil.Error):
            worker = psutil.Process(pid)
            found += sum(_own_bytes(process) for process in (worker, *worker.children(recursive=True)))
    return found


def _own_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        memory = process.memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))
    return 0


async def _followed(process: asyncio.subprocess.Process, on_note: OnNote) -> Result | None:
    """What it says at last; None when it ends without."""
    assert process.stdout is not None
    decoder: msgspec.json.Decoder[FromJob] = msgspec.json.Decoder(FromJob)
    try:
        async for line in process.stdout:
            match decoder.decode(line):
                case Unable(reason):
                    raise HomeinferError(reason)
                case Share() | Opened() as note:
                    on_note(note)
                case result:
                    return result
    except ValueError as problem:  # msgspec's, and asyncio's for a line without end
        raise HomeinferError(f"{_WHAT} said what can't be read: {problem}") from None
    return None


def _death(status: int, said: list[bytes]) -> str:
    if status == -getattr(signal, "SIGKILL", 0):
        return f"{_WHAT} was killed, by someone or because memory ran out"
    end = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{_WHAT} ended with {end}: {last_line(said) or 'no reason given'}"
