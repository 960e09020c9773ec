"""Watching a cluster come up and run: the same for one in this process and for one in another."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from typing import Literal, Protocol

from homeinfer.cli.cluster_changes import Pace, changes, tasks_of
from homeinfer.cli.cluster_live import Screen
from homeinfer.cli.cluster_view import cluster_view, code_view
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import ClusterStatus

_LOOK_SECONDS = 0.25
_CALM_SECONDS = 1.0
_QUESTION = "\nLoad it so? [Y/n] (who joins now is planned with) "
Answer = Literal["yes", "no"]


class Head(Protocol):
    """A coordinator, wherever it is."""

    async def status(self) -> ClusterStatus: ...
    async def plan(self) -> PlanReport | None: ...
    async def order(self, what: Literal["yes", "no", "replan"]) -> str | None:
        """Why it could not be followed, or None."""
        ...


class Watch:
    """Shows a cluster as it changes. asks: a person is there to say yes or no to the plan."""

    def __init__(self, head: Head, screen: Screen, *, asks: bool) -> None:
        self._head, self._screen = head, screen
        self._keyboard = Keyboard() if asks else None
        self._pace = Pace()
        self._before: ClusterStatus | None = None
        self._has_shown_code = self._has_been_ready = False
        self._shown: PlanReport | None = None

    async def until_ready(self) -> ClusterStatus:
        """Returns when it is ready for answers."""
        while True:
            status = await self._look()
            if status.state == "ready":
                return status
            await asyncio.sleep(_LOOK_SECONDS)

    async def forever(self) -> None:
        """For as long as it runs."""
        while True:
            status = await self._look()
            await asyncio.sleep(_CALM_SECONDS if status.state == "ready" else _LOOK_SECONDS)

    async def _look(self) -> ClusterStatus:
        status = await self._head.status()
        is_asked = status.state == "confirming" and self._keyboard is not None
        self._tell(status, lines=is_asked or not self._screen.is_live)
        if is_asked:
            await self._confirm()
        elif self._screen.is_live:
            self._screen.show(cluster_view(status, self._pace.left(tasks_of(status), time.monotonic())))
        if status.state == "ready" and not self._has_been_ready:
            self._has_been_ready = True
            self._screen.say("ready: homeinfer chat")
        return status

    def _tell(self, status: ClusterStatus, *, lines: bool) -> bool:
        """Say what is new and is to stay on the screen, if there is anything."""
        before, self._before = self._before, status
        new = changes(before, status) if lines else ()
        for line in new:
            self._screen.say(line)
        has_code = _is_other_code(before, status)
        if has_code:
            self._screen.say(code_view(status.code or "", is_first=not self._has_shown_code))
            self._has_shown_code = True
        return has_code or bool(new)

    async def _confirm(self) -> None:
        """Ask, unless the plan is answered for or made anew meanwhile."""
        from homeinfer.cli.plan_tables import show_report

        plan = await self._head.plan()
        if plan is None or self._keyboard is None:
            return
        self._screen.pause()
        if plan != self._shown:
            self._screen.say("")
            show_report(plan, has_advice=False)
            self._shown = plan
        self._screen.say(_QUESTION, end="")
        asked = asyncio.create_task(self._keyboard.line())
        try:
            while not asked.done():
                await asyncio.wait({asked}, timeout=_LOOK_SECONDS)
                status = await self._head.status()
                if status.state != "confirming" or await self._head.plan() != plan:
                    self._screen.say("")
                    return
                if self._tell_below(status):
                    self._screen.say(_QUESTION, end="")
        except asyncio.CancelledError:
            self._screen.say("")  # what follows begins a line
            raise
        finally:
            asked.cancel()
        answer = meaning(asked.result())
        if answer is not None:
            await self._head.order(answer)

    def _tell_below(self, status: ClusterStatus) -> bool:
        """What is new while the question stands."""
        if self._before == status or not (changes(self._before, status) or _is_other_code(self._before, status)):
            self._before = status
            return False
        self._screen.say("")
        return self._tell(status, lines=True)


def _is_other_code(before: ClusterStatus | None, now: ClusterStatus) -> bool:
    return now.code is not None and (before is None or before.code != now.code)


def meaning(line: str) -> Answer | None:
    """What somebody meant who typed this at [Y/n]; None: ask again."""
    word = line.strip().lower()
    if word in ("", "y", "yes"):
        return "yes"
    return "no" if word in ("n", "no") else None


class Keyboard:
    """Lines typed at a terminal, for an event loop. The thread that waits for them never keeps a process alive."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._thread: threading.Thread | None = None

    async def line(self) -> str:
        """The next line typed from now on."""
        while not self._lines.empty():
            self._lines.get_nowait()
        if self._thread is None:
            loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._read, args=(loop,), daemon=True)
            self._thread.start()
        return await self._lines.get()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Not through sys.stdin, whose lock a thread that is still reading would hold when Python ends."""
        keyboard = sys.stdin.fileno()
        while True:
            try:
                typed = os.read(keyboard, 1024)
                loop.call_soon_threadsafe(self._lines.put_nowait, typed.decode("utf-8", "replace") or "n")
            except (OSError, RuntimeError):  # the terminal is gone, or the loop
                return
            if not typed:
                return
