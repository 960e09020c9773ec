"""How a command that stays ends: with Ctrl-C, a closed terminal, a shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Any

CTRL_C = 128 + signal.SIGINT


class Stopped(asyncio.Event):
    """Set when this process is asked to end. code: what it is to exit with."""

    code = 0


@contextlib.contextmanager
def signals_as_stop() -> Iterator[Stopped]:
    """Ctrl-C, and the signals of a closed terminal or a shutdown, asked for once; a second one is what it always is."""
    stopped = Stopped()
    loop = asyncio.get_running_loop()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(number: int) -> None:
        stopped.code = 128 + number
        stopped.set()
        for each in numbers:
            loop.remove_signal_handler(each)

    installed = []
    for number in numbers:
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C cancels the task there
            loop.add_signal_handler(number, stop, number)
            installed.append(number)
    try:
        yield stopped
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel it and wait until it is over."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
