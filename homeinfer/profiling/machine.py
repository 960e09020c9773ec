"""What the machine is, as far as this process may use it: asked of the system, nothing is timed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import msgspec
import psutil

from homeinfer.model.header import printable
from homeinfer.profiling.cgroup import cpu_quota, memory_room, usable_threads

_DEFAULT_CACHE = 32 << 20


class Machine(msgspec.Struct, frozen=True):
    """Processor, cores and threads that this process may use, the largest cache in bytes, the system."""

    cpu: str
    cores: int
    threads: int
    cache_bytes: int
    system: str


def this_machine() -> Machine:
    """Ask the system."""
    allowed = allowed_processors()
    quota = cpu_quota()
    cores = usable_threads(_physical_cores(allowed), quota)
    return Machine(
        cpu=cpu_name(),
        cores=cores,
        threads=usable_threads(len(allowed), quota),
        cache_bytes=_last_cache_bytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def usable_memory() -> int:
    """Bytes that can be taken now without pushing other programs out: what the system has available, and no more
    than the control groups of this process leave."""
    available = int(psutil.virtual_memory().available)
    room = memory_room()
    return available if room is None else min(available, room)


def allowed_processors() -> tuple[int, ...]:
    """The numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """What the processor calls itself."""
    found = None
    if Path("/proc/cpuinfo").exists():
        found = re.search(
            r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    if found:
        return printable(" ".join(found[1].split()), 100)
    said = _sysctl("machdep.cpu.brand_string")
    return printable(said or platform.processor() or platform.machine(), 100)


def _sysctl(key: str) -> str:
    if platform.system() != "Darwin":
        return ""
    run = subprocess.run(["/usr/sbin/sysctl", "-n", key], check=False, capture_output=True, text=True)
    return run.stdout.strip()


def _physical_cores(allowed: tuple[int, ...]) -> int:
    """Cores that the allowed processors (hyper-threads) belong to."""
    cores = set()
    for number in allowed:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text())
        except OSError:
            return min(psutil.cpu_count(logical=False) or len(allowed), len(allowed))
    return len(cores)


def _last_cache_bytes() -> int:
    """All caches of the last level together, as far as Linux and macOS say."""
    shared: dict[tuple[int, str], int] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((folder / "level").read_text())
            size = re.fullmatch(r"(\d+)([KMG]?)", (folder / "size").read_text().strip())
            sharers = (folder / "shared_cpu_list").read_text()
        except (OSError, ValueError):
            continue
        if size is not None:
            shared[level, sharers] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    last = max((level for level, _ in shared), default=0)
    total = sum(size for (level, _), size in shared.items() if level == last)
    said = _sysctl("hw.l2cachesize")
    return total or (int(said) if said.isdigit() else _DEFAULT_CACHE)
