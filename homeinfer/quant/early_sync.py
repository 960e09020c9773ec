"""Puts a growing file on the disk while another process writes it, so that little is left to wait for at the end."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

from homeinfer.errors import HomeinferError

_EVERY_SECONDS = 0.5


class EarlySync:
    """A context in whose background `path` is synced to the disk again and again, once it exists; at its end, a last
    time.

    Leaving it normally raises HomeinferError, about a file of the name `said`, where a sync failed: the system tells
    of a failed write only once, to whoever asks first.
    """

    def __init__(self, path: Path, said: str) -> None:
        self._path, self._said = path, said
        self._complete = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._sync, daemon=True)

    def __enter__(self) -> EarlySync:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._complete.set()
        if kind is not None:
            return
        self._thread.join()
        if self._error is not None:
            raise cannot_be_written(self._said, self._error)

    def complete(self) -> None:
        """Nothing is written to the file any more: start the last sync."""
        self._complete.set()

    def _sync(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._complete.wait(_EVERY_SECONDS)
            try:
                with self._path.open("rb+") as file:
                    os.fsync(file.fileno())
            except FileNotFoundError:
                continue
            except OSError as error:
                self._error = error
                return


def cannot_be_written(said: str, error: OSError) -> HomeinferError:
    return HomeinferError(f"{said}: cannot be written: {error.strerror}; try another folder")
