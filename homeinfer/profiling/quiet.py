"""Whether something else kept the machine busy while it was measured."""

from __future__ import annotations

import contextlib
import time

import psutil

from homeinfer.cluster.planning.profile import DeviceProfile

NOISY = 0.1
"""Spread of repeated timings from which on it counts as disturbed."""


class OthersWatch:
    """Processor time that other programs (and a host's other machines) take from now on."""

    def __init__(self) -> None:
        self._begin, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float:
        """Others' share of all processors, 0 to 1."""
        processors = psutil.cpu_count() or 1
        passed = max(time.monotonic() - self._begin, 1e-3) * processors
        others = _busy_seconds() - self._busy - (_own_seconds() - self._own)
        return min(max(others / passed, 0.0), 1.0)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # guests' time is in user time already
    return float(sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))


def _own_seconds() -> float:
    own = psutil.Process()
    total = _seconds(own)
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += _seconds(child)
    return total


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def quiet_note(profile: DeviceProfile) -> str:
    """What to tell a user whose machine was busy; "" where it was quiet."""
    if profile.is_quiet:
        return ""
    spread = f"repeated timings differ by {profile.noise:.0%}" if profile.noise > NOISY else "others used its processor"
    return f"{profile.name} was not quiet while it was measured ({spread}): close what keeps it busy and add --fresh"
