"""Timings in slices: those during which nobody else was busy count, and disturbed ones are made up for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from homeinfer.profiling.quiet import OthersWatch

DISTURBED_SHARE = 0.15
"""Others' share of the processors from which on a slice is disturbed."""

Sample = tuple[list[float], list[float]]


class Slices:
    """Collects slices for `seconds`, and for `patience` more where too few were quiet."""

    def __init__(self, seconds: float, patience: float, *, least: int) -> None:
        """least: how many quiet slices are enough."""
        self._begin = time.perf_counter()
        self._seconds, self._patience, self._least = seconds, patience, least
        self._quiet: list[Sample] = []
        self._other: list[Sample] = []

    def goes_on(self) -> bool:
        """Whether one more is wanted."""
        passed = time.perf_counter() - self._begin
        if len(self._quiet) + len(self._other) < self._least or passed < self._seconds:
            return True
        return self.is_disturbed and passed < self._seconds + self._patience

    def add(self, run: Callable[[], Sample]) -> None:
        """Time one slice."""
        watch = OthersWatch()
        sample = run()
        (self._quiet if watch.share() < DISTURBED_SHARE else self._other).append(sample)

    @property
    def is_disturbed(self) -> bool:
        """Whether too few slices were quiet."""
        return len(self._quiet) < self._least

    @property
    def extra_seconds(self) -> float:
        """What was taken of the patience so far."""
        return max(time.perf_counter() - self._begin - self._seconds, 0.0) if self._patience else 0.0

    def best(self) -> Sample:
        """The quiet slices' timings; where too few were quiet, those of the fastest third, since others can only
        make a slice slower."""
        chosen = self._quiet
        if self.is_disturbed:
            both = sorted([*self._quiet, *self._other], key=lambda sample: statistics.median(sample[0]))
            chosen = both[: max(len(both) // 3, 1)]
        return [x for ones, _ in chosen for x in ones], [x for _, eights in chosen for x in eights]
