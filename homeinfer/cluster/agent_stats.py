"""What a device is doing, as the system says it: cheap enough for every second of an idle evening."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec
import psutil

from homeinfer.cluster.agent_work import working_bytes
from homeinfer.cluster.wire.control import DeviceStats
from homeinfer.folders import free_bytes
from homeinfer.profiling.machine import usable_memory

_SLOW_SECONDS = 5.0
"""What changes slowly, or costs more to ask, is asked so often."""
_SELDOM, _SOON_SECONDS = 1000.0, 2.0
"""What costs the system long to say is asked again after so many times what it cost, at the soonest."""


class _Sums(msgspec.Struct, frozen=True):
    """Counters that only grow."""

    read_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    cpu_seconds: float = 0.0


class Meter:
    """One agent's. `folder`: on the disk whose room is told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._agent = psutil.Process()
        self._engine: psutil.Process | None = None
        self._begin = self._sums()
        self._total = int(psutil.virtual_memory().total)
        self._pressure = pressure_file()
        self._stalls = (time.monotonic(), stalled_seconds(self._pressure))
        self._slow: tuple[float, int] | None = None
        self._share: tuple[float, int] = (0.0, 0)

    def follow(self, engine: int | None) -> None:
        """The engine's pid from now on (None: there is none); sums begin anew."""
        self._engine, self._share = None, (0.0, 0)
        if engine is not None:
            with contextlib.suppress(psutil.Error):
                self._engine = psutil.Process(engine)
        self._begin = self._sums()

    @property
    def engine_bytes(self) -> int:
        """Memory that the engine has now."""
        return _memory(self._engine)

    def read(self) -> DeviceStats:
        now, engine = self._sums(), self.engine_bytes
        return DeviceStats(
            memory_bytes=_memory(self._agent) + engine,
            engine_bytes=self._engine_share(),
            available_bytes=usable_memory() + working_bytes(),
            total_bytes=self._total,
            stalled=self._stalled(),
            read_bytes=max(now.read_bytes - self._begin.read_bytes, 0),
            sent_bytes=max(now.sent_bytes - self._begin.sent_bytes, 0),
            received_bytes=max(now.received_bytes - self._begin.received_bytes, 0),
            cpu_seconds=max(now.cpu_seconds - self._begin.cpu_seconds, 0.0),
            disk_free_bytes=self._disk_free(),
        )

    def _sums(self) -> _Sums:
        sent, received = _network_bytes()
        processes = [self._agent] if self._engine is None else [self._agent, self._engine]
        return _Sums(
            sum(_read_bytes(process) for process in processes),
            sent,
            received,
            sum(_cpu_seconds(process) for process in processes),
        )

    def _engine_share(self) -> int:
        """The engine's memory as a profile measures it: its share of what it has in common with others. The system
        counts pages for that, many in a large engine."""
        due, found = self._share
        begin = time.monotonic()
        if begin >= due:
            found = _share_of(self._engine)
            took = time.monotonic() - begin
            self._share = (begin + max(_SOON_SECONDS, _SELDOM * took), found)
        return found

    def _stalled(self) -> float:
        then, before = self._stalls
        self._stalls = now, stalls = time.monotonic(), stalled_seconds(self._pressure)
        return min(max((stalls - before) / max(now - then, 1e-3), 0.0), 1.0)

    def _disk_free(self) -> int:
        now = time.monotonic()
        if self._slow is None or now - self._slow[0] > _SLOW_SECONDS:
            self._slow = now, free_bytes(self._folder)
        return self._slow[1]


def _memory(process: psutil.Process | None) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss) if process is not None else 0
    return 0


def _share_of(process: psutil.Process | None) -> int:
    with contextlib.suppress(psutil.Error, AttributeError):
        if process is not None:
            memory = process.memory_full_info()
            return int(getattr(memory, "pss", 0) or memory.uss)
    return _memory(process)


def _cpu_seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _read_bytes(process: psutil.Process) -> int:
    """From disk; 0 where the system doesn't tell."""
    with contextlib.suppress(psutil.Error, AttributeError, NotImplementedError, OSError):
        return int(process.io_counters().read_bytes)
    return 0


def _network_bytes() -> tuple[int, int]:
    """(sent, received) of all interfaces but the loopback: processes have no counters of their own."""
    with contextlib.suppress(OSError, RuntimeError):
        found = [each for name, each in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
        return sum(each.bytes_sent for each in found), sum(each.bytes_recv for each in found)
    return 0, 0


def pressure_file(root: Path = Path("/")) -> Path | None:
    """Where the kernel tells how long something waited for memory: of this process's group, else of the machine."""
    candidates = [root / "proc/pressure/memory"]
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        group = next(line.split("::", 1)[1] for line in lines if line.startswith("0::"))
        if group != "/":
            candidates.insert(0, root / "sys/fs/cgroup" / group.lstrip("/") / "memory.pressure")
    return next((path for path in candidates if os.access(path, os.R_OK)), None)


def stalled_seconds(path: Path | None) -> float:
    """Seconds since boot in which something waited for memory."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if path is not None:
            return int(path.read_text().split("total=", 1)[1].split()[0]) / 1e6
    return 0.0


def oom_kills(root: Path = Path("/")) -> int:
    """How often the kernel ended a process on this machine for want of memory, since boot; 0 where it doesn't say."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
