"""Bytes done, told as a share."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Shares:
    """Adds up what several threads have done."""

    def __init__(self, total: int, on_progress: Callable[[float], None]) -> None:
        self._total = max(total, 1)
        self._done = 0
        self._lock = threading.Lock()
        self._on_progress = on_progress

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            share = min(1.0, self._done / self._total)
        self._on_progress(share)
