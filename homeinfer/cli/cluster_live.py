"""The screen of a long-running command: a live view on a terminal, lines of a log elsewhere."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from homeinfer.cli.ui import console


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
    """Shows a view that changes and, above it, lines that stay. On something that is no terminal only the lines."""

    def __init__(self, where: Console = console) -> None:
        self._console = where
        self._live: Live | None = None
        self.is_live = where.is_terminal

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()

    def show(self, view: RenderableType) -> None:
        """Put this in the view's place."""
        if not self.is_live:
            return
        if self._live is None:
            # drawn when something is new, not by a thread several times a second
            self._live = Live(view, console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        else:
            self._live.update(view, refresh=True)

    def pause(self) -> None:
        """Take the view off the screen, for a question or for good."""
        if self._live is not None:
            self._live.stop()
        self._live = None

    def say(self, what: RenderableType | str, end: str = "\n") -> None:
        """A line, or more, that stays."""
        shown = Text(what) if isinstance(what, str) else what
        self._console.print(shown, soft_wrap=True, end=end)
