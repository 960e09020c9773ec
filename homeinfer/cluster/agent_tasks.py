"""An agent's slow work, one task of a kind at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from homeinfer.errors import HomeinferError

_AGAIN_SECONDS = 1.0

OnFailed = Callable[[str, str], None]
"""Called with the kind of task and why it could not be done."""


class Tasks:
    """Tasks by kind. One that fails is told of and ends; the others go on."""

    def __init__(self, on_failed: OnFailed) -> None:
        self._on_failed = on_failed
        self._running: dict[str, tuple[object, asyncio.Task[None]]] = {}

    def start(self, kind: str, what: object, work: Callable[[], Awaitable[None]]) -> None:
        """Begin a task, unless one of this kind that does the same (an equal `what`) is under way: another one is
        cancelled, and has ended before the new one begins."""
        before = self._running.get(kind)
        if before is not None and not before[1].done():
            if before[0] == what and not before[1].cancelling():
                return
            before[1].cancel()
        task = asyncio.create_task(self._do(kind, None if before is None else before[1], work))
        self._running[kind] = entry = (what, task)

        def forget(_task: asyncio.Task[None]) -> None:
            if self._running.get(kind) is entry:
                del self._running[kind]

        task.add_done_callback(forget)

    async def _do(self, kind: str, before: asyncio.Task[None] | None, work: Callable[[], Awaitable[None]]) -> None:
        if before is not None:
            await end(before)
        try:
            await work()
        except HomeinferError as problem:
            self._on_failed(kind, str(problem))
        except Exception as problem:  # one task's bug must not end the agent, and with it the engine
            self._on_failed(kind, f"{kind} failed unexpectedly: {type(problem).__name__}: {problem}")

    async def wait(self, kind: str) -> None:
        """Until the task of this kind that is under way, if there is one, has ended."""
        if kind in self._running:
            await asyncio.wait({self._running[kind][1]})

    async def stop(self, *kinds: str) -> None:
        """Cancel what is under way of these kinds (of all, when none is named) and wait for its end."""
        chosen = [task for kind, (_, task) in self._running.items() if not kinds or kind in kinds]
        await end(*chosen)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended: asyncio.wait_for, where a library uses it, loses a cancellation that comes
    when it has its result."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_SECONDS)


async def to_the_end(work: Awaitable[None]) -> None:
    """Await what must not be left half done, however often this is cancelled meanwhile."""
    doing = asyncio.ensure_future(work)
    is_cancelled = False
    while not doing.done():
        try:
            await asyncio.shield(doing)
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError
    doing.result()
