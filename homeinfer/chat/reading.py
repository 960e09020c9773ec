"""A line on the screen while an answer's first word is waited for."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

_AFTER_SECONDS = 2.0


class Reading:
    """Says that the first word is waited for, from `after` seconds on until `done` or the end of the block. On a
    terminal only."""

    def __init__(self, notes: Console, after: float = _AFTER_SECONDS) -> None:
        line = Text("waiting for the first word", style="dim")
        self._line = Live(line, console=notes, auto_refresh=False, transient=True)
        self._timer = threading.Timer(after, self._show)
        self._timer.daemon = True
        self._has_screen = notes.is_terminal
        self._is_done = False

    def __enter__(self) -> Reading:
        if self._has_screen:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()

    def _show(self) -> None:
        self._line.start(refresh=True)

    def done(self) -> None:
        """The first word is there, or nothing is read any more. Safe to call again and again."""
        if self._is_done or not self._has_screen:
            return
        self._is_done = True
        self._timer.cancel()
        self._timer.join()
        self._line.stop()
