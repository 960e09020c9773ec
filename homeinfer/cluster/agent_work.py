"""An agent's slow work, in processes that end with it: started, followed, and ended when nobody wants it any more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

import homeinfer
from homeinfer.cluster.agent_jobs import FromJob, Job, Opened, Result, Share, Unable
from homeinfer.cluster.agent_tasks import to_the_end
from homeinfer.errors import HomeinferError

_MOST_LINE = 64 << 20
_END_SECONDS = 5.0
"""A process that is told to end gets so long to remove what it was writing."""

OnNote = Callable[[Share | Opened], None]


async def work(job: Job, on_note: OnNote = lambda _note: None, environment: Mapping[str, str] = os.environ) -> Result:
    """Let a process do a job; cancelling ends it. Raises HomeinferError that says why it could not be done."""
    # -P with the package's own folder: what lies in the working directory must not be imported
    paths = [str(Path(homeinfer.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "homeinfer.cluster.agent_worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_MOST_LINE,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,  # a Ctrl-C in the terminal is the agent's to deal with
    )
    said: list[bytes] = []
    listening = asyncio.create_task(_last_lines(process, said))
    try:
        return await _follow(process, job, on_note, said, listening)
    finally:
        await to_the_end(_end(process, listening))


async def _follow(
    process: asyncio.subprocess.Process, job: Job, on_note: OnNote, said: list[bytes], listening: asyncio.Task[None]
) -> Result:
    assert process.stdin is not None
    assert process.stdout is not None
    decoder: msgspec.json.Decoder[FromJob] = msgspec.json.Decoder(FromJob)
    with contextlib.suppress(ConnectionError):  # why it has ended is what follows
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        await process.stdin.drain()
    async for line in process.stdout:
        match decoder.decode(line):
            case Unable(reason):
                raise HomeinferError(reason)
            case Share() | Opened() as note:
                on_note(note)
            case result:
                return result
    status = await process.wait()
    await listening
    raise HomeinferError(_death(status, said))


async def _last_lines(process: asyncio.subprocess.Process, said: list[bytes]) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        if line.strip():
            said[:] = [*said[-9:], line.strip()]


def _death(status: int, said: list[bytes]) -> str:
    what = "the process that works for this device"
    if status == -signal.SIGKILL:
        return f"{what} was killed, by someone or because memory ran out"
    end = signal.Signals(-status).name if status < 0 else f"status {status}"
    last = said[-1].decode("utf-8", "replace")[:500] if said else "no reason given"
    return f"{what} ended with {end}: {last}"


async def _end(process: asyncio.subprocess.Process, listening: asyncio.Task[None]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), _END_SECONDS)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    listening.cancel()
