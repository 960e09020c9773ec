"""What control groups leave, read from the files as the kernel writes them (folders made here stand for /)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from homeinfer.profiling.cgroup import cpu_quota, memory_room, usable_threads

V1 = """35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct
"""
V2 = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
HYBRID = V1 + "42 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


def made(root: Path, files: Mapping[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def v1(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, object]:
    at = f"sys/fs/cgroup/memory/{folder}"
    stat = f"inactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file 0\ntotal_mapped_file 0\n"
    return {f"{at}/memory.limit_in_bytes": limit, f"{at}/memory.usage_in_bytes": used, f"{at}/memory.stat": stat}


def v2(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    at = f"sys/fs/cgroup/{folder}"
    return {f"{at}/memory.max": limit, f"{at}/memory.current": used, f"{at}/memory.stat": f"inactive_file {cache}\n"}


def test_the_smallest_room_along_a_version_1_path_counts_and_its_file_cache_is_free(tmp_path: Path) -> None:
    said = {"proc/self/cgroup": "4:memory:/a/b\n1:cpu,cpuacct:/\n", "proc/self/mountinfo": V1}
    root = made(tmp_path, said | v1("a/b", 900, 300, cache=100) | v1("a", 800, 500, cache=50) | v1("", 1 << 62, 700))
    assert memory_room(root) == 350


def test_the_smallest_room_along_a_version_2_path_counts(tmp_path: Path) -> None:
    said = {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": V2}
    root = made(tmp_path, said | v2("a/b", "max", 100) | v2("a", 1000, 400, cache=150))
    assert memory_room(root) == 750


def test_both_versions_at_once_are_both_asked(tmp_path: Path) -> None:
    said = {"proc/self/cgroup": "4:memory:/a\n0::/b\n", "proc/self/mountinfo": HYBRID}
    root = made(tmp_path, said | v1("a", 900, 100) | v2("unified/b", 500, 100))
    assert memory_room(root) == 400


def test_a_container_that_sees_only_its_own_group_has_its_limit(tmp_path: Path) -> None:
    mount = "35 31 0:32 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    said = {"proc/self/cgroup": "4:memory:/docker/x\n", "proc/self/mountinfo": mount}
    assert memory_room(made(tmp_path / "one", said | v1("", 600, 100))) == 500
    outside = said | {"proc/self/cgroup": "4:memory:/../../elsewhere\n"}
    assert memory_room(made(tmp_path / "two", outside | v1("", 600, 200))) == 400


def test_a_mount_that_this_process_does_not_see_is_found_through_the_one_above_it(tmp_path: Path) -> None:
    said = {
        "proc/self/cgroup": "4:memory:/prof0\n",
        "proc/self/mountinfo": "50 47 0:39 / /sys rw - sysfs prof0 rw\n",
        "proc/self/status": "Name:\tpython\nPPid:\t77\n",
        "proc/77/mountinfo": V1,
    }
    group = {f"proc/77/root/{name}": text for name, text in v1("prof0", 600, 50).items()}
    assert memory_room(made(tmp_path, said | group)) == 550


def test_without_a_limit_or_without_groups_there_is_none(tmp_path: Path) -> None:
    said = {"proc/self/cgroup": "4:memory:/a\n0::/\n", "proc/self/mountinfo": HYBRID}
    assert memory_room(made(tmp_path / "one", said | v1("a", (1 << 63) - 4096, 300))) is None
    assert memory_room(tmp_path / "none") is None
    assert cpu_quota(tmp_path / "none") is None


def test_a_group_that_uses_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    said = {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2}
    assert memory_room(made(tmp_path, said | v2("a", 100, 400))) == 0


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("150000", 1.5)])
def test_a_quota_of_version_1_is_in_processors(tmp_path: Path, quota: str, expected: float | None) -> None:
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}
    said = {"proc/self/cgroup": "1:cpu,cpuacct:/a\n", "proc/self/mountinfo": V1}
    root = made(tmp_path, said | {f"sys/fs/cgroup/cpu/a/{name}": text for name, text in files.items()})
    assert cpu_quota(root) == expected


def test_the_smallest_quota_of_version_2_counts(tmp_path: Path) -> None:
    said = {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": V2}
    quotas = {"sys/fs/cgroup/a/cpu.max": "50000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}
    assert cpu_quota(made(tmp_path, said | quotas)) == 0.5


def test_a_quota_limits_threads_and_leaves_one_at_least() -> None:
    assert usable_threads(8, None) == 8
    assert usable_threads(8, 2.5) == 3
    assert usable_threads(1, 4.0) == 1
    assert usable_threads(8, 0.2) == 1
