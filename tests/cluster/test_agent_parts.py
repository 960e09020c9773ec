"""The small decisions of an agent, without a head."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from homeinfer.cluster.agent import listens_at
from homeinfer.cluster.agent_engine import is_about_memory
from homeinfer.cluster.agent_stats import Meter, oom_kills, pressure_file, stalled_seconds
from homeinfer.cluster.agent_tasks import Tasks
from homeinfer.cluster.agent_weights import Allowed
from homeinfer.cluster.agent_windows import WindowFile, remove_unused, unused
from homeinfer.cluster.members import Members
from homeinfer.cluster.wire.transport import new_keys
from homeinfer.errors import HomeinferError


@pytest.mark.parametrize(
    ("problem", "oom_kills", "expected"),
    [
        ("the engine of desk (layers 0-3) ended: killed by SIGKILL (out of memory?)", 1, True),
        ("the engine of desk (layers 0-3) ended: killed by SIGKILL (out of memory?)", 0, False),
        ("desk (layers 0-3): x.gguf: no memory for a context of 4096 tokens: try a smaller --ctx", 0, True),
        ("the engine of desk (layers 0-3) ended: terminate called: std::bad_alloc", 0, True),
        ("the engine of desk (layers 0-3) ended: GGML_ASSERT(n > 0) failed", 3, False),
    ],
)
def test_an_engine_that_ended_for_want_of_memory_is_told_apart(problem: str, oom_kills: int, expected: bool) -> None:
    assert is_about_memory(problem, oom_kills) is expected


def test_windows_of_this_plan_and_of_the_one_before_are_kept() -> None:
    files = [WindowFile(name, used) for name, used in (("a", 5), ("b", 4), ("c", 3), ("d", 2), ("e", 1))]
    assert unused(files, ("a", "b")) == ("e",)
    assert unused(files, ("e",)) == ("b", "c", "d")
    assert unused(files, ("a", "b"), kept=1) == ("c", "d", "e")
    assert unused(files, ()) == ("a", "b", "c", "d", "e")


def test_window_files_that_nobody_needs_go_with_what_killed_processes_left(tmp_path: Path) -> None:
    names = ["new.gguf", "before.gguf", "old.gguf", ".x.gguf.a.part", ".y.gguf.b.part"]
    for age, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (1e9 - age, 1e9))
    os.utime(tmp_path / ".y.gguf.b.part")
    remove_unused(tmp_path, (str(tmp_path / "new.gguf"),))
    assert {path.name for path in tmp_path.iterdir()} == {"new.gguf", "before.gguf", ".y.gguf.b.part"}
    assert (tmp_path / "new.gguf").stat().st_mtime == 1e9


def test_stats_are_plausible_and_begin_anew_with_an_engine(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "not" / "made" / "yet")
    stats = meter.read()
    assert 10e6 < stats.memory_bytes < 4e9
    assert 0 < stats.available_bytes <= stats.total_bytes == psutil.virtual_memory().total
    assert stats.disk_free_bytes > 0
    assert 0 <= stats.stalled <= 1
    meter.follow(os.getpid())
    assert meter.engine_bytes > 10e6
    stats = meter.read()
    assert stats.cpu_seconds < 5
    assert 1e6 < stats.engine_bytes < stats.memory_bytes
    meter.follow(None)
    assert meter.engine_bytes == 0


def test_stalls_and_kills_are_read_from_the_system(tmp_path: Path) -> None:
    assert pressure_file(tmp_path) is None
    assert stalled_seconds(None) == 0.0
    assert oom_kills(tmp_path) == 0
    for name, text in {
        "proc/vmstat": "nr_free_pages 7\noom_kill 3\n",
        "proc/self/cgroup": "0::/home/desk\n",
        "proc/pressure/memory": "some avg10=0.00 avg60=0.00 total=900\nfull total=1\n",
        "sys/fs/cgroup/home/desk/memory.pressure": "some avg10=0.00 avg60=0.00 total=2500000\nfull total=1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == 3
    assert stalled_seconds(pressure_file(tmp_path)) == 2.5


@pytest.mark.parametrize(
    ("host", "hosts", "expected"),
    [
        ("127.0.0.2", ("192.168.1.5",), "tcp://127.0.0.2:*"),
        ("localhost", (), "tcp://127.0.0.1:*"),
        ("192.168.1.5", ("127.0.0.1",), "tcp://*:*"),
        ("", ("127.0.0.2",), "tcp://127.0.0.1:*"),
        ("", ("::1",), "tcp://[::1]:*"),
        ("", ("127.0.0.1", "desk.local"), "tcp://*:*"),
    ],
)
def test_a_cluster_on_one_machine_is_not_open_to_the_network(host: str, hosts: tuple[str, ...], expected: str) -> None:
    assert listens_at(host, hosts) == expected


def test_weights_go_to_devices_of_the_cluster_only(tmp_path: Path) -> None:
    head, own, member, named, stranger = (new_keys()[0] for _ in range(5))
    members = Members(tmp_path)
    members.add("lap", member)
    on_head, elsewhere = Allowed(frozenset((head, own)), members), Allowed(frozenset((head, own)))
    elsewhere.keys = frozenset((named,))
    assert [on_head(key) for key in (head, own, member, named, stranger)] == [True, True, True, False, False]
    assert [elsewhere(key) for key in (head, own, member, named, stranger)] == [True, True, False, True, False]
    members.forget("lap")
    assert not on_head(member)


def test_tasks_of_a_kind_follow_each_other_and_equal_ones_are_one() -> None:
    done: list[str] = []
    failed: list[tuple[str, str]] = []

    async def slow(name: str, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            done.append(name)

    async def fails(problem: Exception) -> None:
        raise problem

    async def test() -> None:
        tasks = Tasks(lambda kind, reason: failed.append((kind, reason)))
        tasks.start("load", 1, lambda: slow("first", 10))
        await asyncio.sleep(0)
        tasks.start("load", 1, lambda: slow("equal", 0))
        tasks.start("load", 2, lambda: slow("second", 0.01))
        tasks.start("fetch", 0, lambda: fails(HomeinferError("no room")))
        tasks.start("measure", 0, lambda: fails(ValueError("a bug")))
        await tasks.wait("load")
        tasks.start("load", 2, lambda: slow("third", 10))
        await asyncio.sleep(0.01)
        await tasks.stop()

    asyncio.run(test())
    assert done == ["first", "second", "third"]
    assert failed == [("fetch", "no room"), ("measure", "measure failed unexpectedly: ValueError: a bug")]


def test_tasks_that_are_over_are_forgotten_however_many_there_were() -> None:
    async def test() -> int:
        tasks = Tasks(lambda _kind, _reason: None)
        for number in range(100):
            tasks.start(f"probe {number}", number, lambda: asyncio.sleep(0))
        tasks.start("load", 1, lambda: asyncio.sleep(10))
        tasks.start("load", 2, lambda: asyncio.sleep(10))
        for _ in range(5):
            await asyncio.sleep(0)
        n = len(tasks._running)
        await tasks.stop()
        return n

    assert asyncio.run(test()) == 1
