"""How fast weights may move."""

from __future__ import annotations

import asyncio
import contextlib
import time


class RateLimit:
    """Bytes per second for all who share it; may be changed at any time (from the event loop's thread)."""

    def __init__(self, most_bytes_per_s: int = 0) -> None:
        """0: no limit."""
        self._rate = most_bytes_per_s
        self._free_at = 0.0
        self._changed = asyncio.Event()

    def set(self, most_bytes_per_s: int) -> None:
        """From now on; who waits under the old limit goes by the new one at once."""
        self._rate = most_bytes_per_s
        self._free_at = 0.0
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def most_bytes_per_s(self) -> int:
        return self._rate

    async def rest(self, seconds: float) -> None:
        """Let others have the link for so long, or until the limit is another one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def take(self, nbytes: int) -> None:
        """Wait for one's turn to move nbytes."""
        while self._rate:
            now = time.monotonic()
            if self._free_at <= now:
                self._free_at = now + nbytes / self._rate
                return
            await self.rest(self._free_at - now)
