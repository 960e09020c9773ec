"""What control groups leave to this process: memory and processor time, of version 1, 2 and both at once.

Reads /proc/self/cgroup, /proc/self/mountinfo and the files of every group from this process's own up to the root:
the smallest room counts. Elsewhere than on Linux nothing is limited.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_UNLIMITED = 1 << 60
"""Version 1 says "no limit" with a number near 2^63."""
_MOST_PARENTS = 64


def memory_room(root: Path = Path("/")) -> int | None:
    """Bytes that this process's groups let it take now: limit less use, where file cache that can be dropped is no
    use. None without a limit. `root` holds proc and sys (tests)."""
    rooms = [_room_v1(folder) for folder in _groups(root, "memory")]
    rooms += [_room_v2(folder) for folder in _groups(root, "")]
    return min((max(room, 0) for room in rooms if room is not None), default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that this process's groups let it take; None without a limit."""
    quotas = [_quota_v1(folder) for folder in _groups(root, "cpu")]
    quotas += [_quota_v2(folder) for folder in _groups(root, "")]
    return min((quota for quota in quotas if quota is not None), default=None)


def usable_threads(allowed: int, quota: float | None) -> int:
    """Threads that can run at once: a quota of 1.5 processors keeps two busy at times."""
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def _room_v1(folder: Path) -> int | None:
    said = _numbers(folder / "memory.stat")
    limits = (_number(folder / "memory.limit_in_bytes"), said.get("hierarchical_memory_limit"))
    limit = min((value for value in limits if value is not None), default=_UNLIMITED)
    used = _number(folder / "memory.usage_in_bytes")
    if limit >= _UNLIMITED or used is None:
        return None
    cache = said.get("total_inactive_file", 0) + said.get("total_active_file", 0) - said.get("total_mapped_file", 0)
    return limit - used + max(cache, said.get("total_inactive_file", 0))


def _room_v2(folder: Path) -> int | None:
    limits = (_number(folder / "memory.max"), _number(folder / "memory.high"))
    limit = min((value for value in limits if value is not None), default=None)
    used = _number(folder / "memory.current")
    if limit is None or used is None:
        return None
    said = _numbers(folder / "memory.stat")
    cache = said.get("inactive_file", 0) + said.get("active_file", 0) - said.get("file_mapped", 0)
    return limit - used + max(cache, said.get("inactive_file", 0))


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return None if quota is None or quota <= 0 or not period else quota / period


def _quota_v2(folder: Path) -> float | None:
    said = (_text(folder / "cpu.max") or "").split()
    if len(said) != 2 or not all(word.isdigit() for word in said) or int(said[1]) == 0:
        return None
    return int(said[0]) / int(said[1])


def _groups(root: Path, controller: str) -> tuple[Path, ...]:
    """The folders of this process's group and of those above it; controller "" means version 2."""
    return _found_groups(root, controller, _path_of(root, controller))


@functools.lru_cache(maxsize=8)
def _found_groups(root: Path, controller: str, path: str | None) -> tuple[Path, ...]:
    """Looked for once: an agent asks every second, and a process's view of the file system stays as it is."""
    return tuple(_walk(root, controller, path))


def _walk(root: Path, controller: str, path: str | None) -> Iterator[Path]:
    mount = _mount_of(root, controller)
    if path is None or mount is None:
        return
    mounted, top = mount
    try:
        inside = PurePosixPath(path).relative_to(mounted)
    except ValueError:
        inside = PurePosixPath()  # a container's own view: what is mounted is its group
    if ".." in inside.parts:
        inside = PurePosixPath()
    folder = top / inside
    while folder != top:
        if folder.is_dir():
            yield folder
        folder = folder.parent
    yield top


def _path_of(root: Path, controller: str) -> str | None:
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, names, path = (*line.split(":", 2), "", "")[:3]
        if (number == "0" and not names) if not controller else controller in names.split(","):
            return path
    return None


def _mount_of(root: Path, controller: str) -> tuple[str, Path] | None:
    """Which group is mounted, and where: in this process's view of the file system, or, where it is not (`ip netns
    exec` hides it), in that of a process above."""
    pids = (root / "proc/self", *_parents(root))
    found = (_mounted(process, controller, root if i == 0 else process / "root") for i, process in enumerate(pids))
    return next((mount for mount in found if mount is not None), None)


def _parents(root: Path) -> Iterator[Path]:
    """The folders in /proc of the processes that started this one."""
    process = root / "proc/self"
    for _ in range(_MOST_PARENTS):
        said = re.search(r"^PPid:\s*([1-9]\d*)$", _text(process / "status") or "", re.MULTILINE)
        if said is None:
            return
        process = root / "proc" / said[1]
        yield process


def _mounted(process: Path, controller: str, top: Path) -> tuple[str, Path] | None:
    for line in (_text(process / "mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, said = left.split(), right.split()
        if len(fields) < 5 or len(said) < 3:
            continue
        if said[0] == "cgroup2" if not controller else said[0] == "cgroup" and controller in said[2].split(","):
            folder = top / fields[4].replace("\\040", " ").lstrip("/")
            with contextlib.suppress(OSError):
                if folder.is_dir():
                    return fields[3], folder
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    said = (_text(path) or "").strip()
    return int(said) if said.lstrip("-").isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in (_text(path) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
