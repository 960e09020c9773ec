"""How far a profile is: steps with the seconds that each is expected to take."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, float, float], None]
"""Called with what is being measured, the share that is done (0 to 1), and the seconds that are expected to be left."""


def silent(_what: str, _share: float, _left: float) -> None:
    """For callers that don't want to know."""


class Steps:
    """Counts the seconds that are expected; what is found in the cache is not."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._tell, self._done, self._total = on_progress, 0.0, 0.0
        self._what, self._now = "", 0.0

    def expect(self, seconds: float) -> None:
        """More to do."""
        self._total += seconds

    def begin(self, what: str, seconds: float) -> None:
        """The next step, of those expected."""
        self._done += self._now
        self._what, self._now = what, seconds
        self.part(0.0)

    def part(self, share: float) -> None:
        """So much of the current step is done."""
        done = self._done + share * self._now
        self._tell(self._what, min(done / max(self._total, 1e-9), 1.0), max(self._total - done, 0.0))
