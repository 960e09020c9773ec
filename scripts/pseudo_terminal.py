"""A command in a terminal of its own, as a person sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

PATIENCE = 180.0
COLUMNS = 100
_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*(?:[A-Za-z]|\Z)|\Z)")
_LOOK_SECONDS = 0.05
_OWN_TERMINAL = (
    sys.executable,
    "-Sc",
    "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])",
)
"""Makes the terminal the one whose Ctrl-C reaches the command: not between fork and exec, with threads at work here."""


class Terminal:
    """Starts a command in a pseudo terminal and a session of its own, and reads what it shows as it comes.

    has_keys: it reads what is typed there; else its standard input is a pipe. `close` kills it if it still runs.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        folder: Path | None = None,
        rows: int = 40,
        has_keys: bool = True,
    ) -> None:
        self._master, self.device = pty.openpty()
        fcntl.ioctl(self.device, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))
        self.settings = termios.tcgetattr(self.device)
        self.process = subprocess.Popen(
            [*_OWN_TERMINAL, *words],
            stdin=self.device if has_keys else subprocess.PIPE,
            stdout=self.device,
            stderr=self.device,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        self.shown = b""
        self._seen = 0
        self._has_ended = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def text(self) -> str:
        """All that was shown so far, without escape sequences."""
        return plain(self.shown.decode("utf-8", "replace"))

    def type(self, keys: str) -> None:
        """At its keyboard, or into its pipe."""
        pipe = self.process.stdin
        if pipe is None:
            os.write(self._master, keys.encode())
        else:
            pipe.write(keys.encode())
            pipe.flush()

    def see(self, pattern: str) -> str:
        """Wait for what was not seen yet: the new text down to it."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.text[self._seen :])) is None:
            assert time.monotonic() < deadline, f"{pattern!r} was not seen in {self.text[self._seen :]!r}"
            time.sleep(0.02)
        before, self._seen = self._seen, self._seen + found.end()
        return self.text[before : self._seen]

    def skip(self) -> None:
        """What is shown now counts as seen."""
        self._seen = len(self.text)

    def ends(self) -> int:
        """Wait for its end, and for the rest of what it shows; its exit status."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end: {self.text[-2000:]!r}") from None
        self._has_ended.set()
        self._reader.join()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ends()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        os.close(self.device)
        os.close(self._master)

    def _read(self) -> None:
        while True:
            has_ended = self._has_ended.is_set()
            if select.select([self._master], [], [], _LOOK_SECONDS)[0]:
                data = os.read(self._master, 1 << 16)
                self.shown += data
                # where is the cursor? prompt_toolkit asks, and shows the line at the bottom when it knows
                os.write(self._master, b"\x1b[1;1R" * data.count(b"\x1b[6n"))
            elif has_ended:
                return


def plain(text: str) -> str:
    """Without escape sequences, the one that is just coming included."""
    return _ESCAPE.sub("", text)
