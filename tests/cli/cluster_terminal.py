"""A command in a terminal of its own, as a person sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import time
from types import TracebackType

_PATIENCE = 60.0


class Terminal:
    """Starts a command with a pseudo terminal of 100 columns; kills it at the end if it still runs."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self._process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self._shown = b""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    @property
    def text(self) -> str:
        """All that was shown so far, without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._shown.decode("utf-8", "replace"))

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def see(self, pattern: str) -> None:
        """Wait for what was not seen yet."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            self._read()
            found = re.search(pattern, self.text[self._seen :])
            if found:
                self._seen += found.end()
                return
            assert time.monotonic() < deadline, f"{pattern!r} was not seen in {self.text[self._seen :]!r}"
            time.sleep(0.02)

    def ends(self) -> int:
        """Wait for it to end; its exit status."""
        deadline = time.monotonic() + _PATIENCE
        while self._process.poll() is None:
            self._read()
            assert time.monotonic() < deadline, f"it did not end: {self.text[-2000:]!r}"
            time.sleep(0.02)
        self._read()
        return self._process.returncode

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nothing new, or the other end is closed
            while data := os.read(self._master, 1 << 16):
                self._shown += data
