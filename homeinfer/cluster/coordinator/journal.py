"""Answers on the head's disk: what a client was told is never lost, however the head ends."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from homeinfer.cluster.wire.client import AskAnswer
from homeinfer.engine.request import Finish
from homeinfer.folders import private_folder

_SUFFIX = ".answer"
_KEPT_SECONDS = 3600.0


class Kept(msgspec.Struct, frozen=True):
    """An answer as its journal tells it. finish: None while it is not whole. asked: when, seconds of the wall clock."""

    ask: AskAnswer
    told: tuple[int, ...]
    finish: Finish | None
    asked: float


class Journal:
    """One file for each answer in `folder`: the question, then a line for each token, then how it ended.

    Lines are written and not synced: they survive the end of this process, and with the machine those who were told
    end as well. Raises HomeinferError when the folder can't be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder)
        self._files: dict[str, IO[bytes]] = {}

    def begin(self, ask: AskAnswer) -> None:
        """Raises OSError when the disk is full."""
        self._write(ask.id, msgspec.json.encode(ask))

    def tokens(self, answer: str, tokens: Sequence[int]) -> None:
        """The next ones. Raises OSError when the disk is full."""
        self._write(answer, b"\n".join(b"%d" % token for token in tokens))

    def finish(self, answer: str, finish: Finish) -> None:
        """It is whole: kept for those who come back, for a while."""
        with contextlib.suppress(OSError):
            self._write(answer, msgspec.json.encode(finish))
        self.close(answer)

    def forget(self, answer: str) -> None:
        self.close(answer)
        with contextlib.suppress(OSError):
            self._path(answer).unlink(missing_ok=True)

    def close(self, answer: str) -> None:
        file = self._files.pop(answer, None)
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def close_all(self) -> None:
        for answer in list(self._files):
            self.close(answer)

    def load(self) -> tuple[Kept, ...]:
        """The answers of before, oldest first; very old and damaged ones are removed."""
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            kept = _read(path)
            if kept is None or time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink(missing_ok=True)
            else:
                found.append(kept)
        return tuple(sorted(found, key=lambda kept: kept.asked))

    def _path(self, answer: str) -> Path:
        return self._folder / f"{answer}{_SUFFIX}"

    def _write(self, answer: str, line: bytes) -> None:
        if answer not in self._files:
            handle = os.open(self._path(answer), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._files[answer] = os.fdopen(handle, "ab", buffering=0)
        whole = line + b"\n"
        if self._files[answer].write(whole) != len(whole):  # what follows would be read as a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read(path: Path) -> Kept | None:
    """None for what is no journal. A last line that was cut off counts for nothing, and is cut off the file."""
    try:
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)
        first, *rest = data[:end].splitlines()
        ask = msgspec.json.decode(first, type=AskAnswer)
        finish = msgspec.json.decode(rest.pop(), type=Finish) if rest and rest[-1].startswith(b"{") else None
        return Kept(ask, tuple(int(line) for line in rest), finish, path.stat().st_ctime)
    except (OSError, ValueError, msgspec.MsgspecError):
        return None
