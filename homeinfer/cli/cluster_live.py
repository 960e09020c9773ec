"""The screen of a long-running command: a live view on a terminal, lines of a log elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from homeinfer.cli.ui import console

_PATIENCE = 1.0
_LAST_PATIENCE = 5.0
"""For what is said last: on a busy machine a second may be too short, and what is not written then is lost."""
_MOST_WAITING = 200
"""Lines that a screen which stands still will show later; further ones are lost."""


def has_person() -> bool:
    """Whether somebody sits in front of this command: it has a terminal, in the foreground."""
    if sys.stdin is None or not sys.stdin.isatty() or not sys.stdout.isatty():
        return False
    if not hasattr(os, "tcgetpgrp"):
        return True
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        return False


class Screen:
    """Shows a view that changes and, above it, lines that stay. On something that is no terminal only the lines.

    A thread writes: a terminal that takes nothing (Ctrl-S, a lost ssh connection) or a reader who has left must not
    stop a head or a device.
    """

    def __init__(self, where: Console = console) -> None:
        self._console = where
        self._live: Live | None = None
        self.is_live = where.is_terminal
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._view: RenderableType = ""
        self._is_drawn = True
        self._is_writing = self._is_stuck = False
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause(_LAST_PATIENCE)

    def show(self, view: RenderableType) -> None:
        """Put this in the view's place."""
        if not self.is_live:
            return
        with self._changed:
            self._view = view
            if self._is_drawn:
                self._is_drawn = False
                self._add(self._draw)

    def pause(self, patience: float | None = None) -> None:
        """Take the view off the screen, for a question or for good. patience: seconds, also for one that stands
        still."""
        with self._changed:
            self._add(self._stop)
            self._settle(patience)

    def say(self, what: RenderableType | str, end: str = "\n") -> None:
        """A line, or more, that stays."""
        shown = Text(what) if isinstance(what, str) else what
        with self._changed:
            self._add(lambda: self._console.print(shown, soft_wrap=True, end=end))
            self._settle()

    def _add(self, job: Callable[[], None]) -> None:
        """For a thread that holds `_changed`."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
        if len(self._jobs) < _MOST_WAITING:
            self._jobs.append(job)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()

    def _settle(self, patience: float | None = None) -> None:
        """Wait until all is written; without `patience`, not for a screen that stands still."""
        if patience is None:
            patience = 0.0 if self._is_stuck else _PATIENCE
        is_done = self._changed.wait_for(lambda: not self._jobs and not self._is_writing, patience)
        self._is_stuck = not is_done
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _write(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs)
                job, self._is_writing = self._jobs.popleft(), True
            try:
                with contextlib.suppress(OSError, SystemExit):  # rich's for a pipe that nobody reads
                    job()
            except Exception as problem:  # for whoever says or shows something next
                with self._changed:
                    self._problem = problem

    def _draw(self) -> None:
        with self._changed:
            view, self._is_drawn = self._view, True
        if self._live is None:
            # drawn when something is new, not by a thread several times a second
            self._live = Live(view, console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        else:
            self._live.update(view, refresh=True)

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
