"""What a head leaves for those who look for it, and for the one that follows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from homeinfer.cluster.coordinator.running import (
    RunningCluster,
    remove_running,
    run_folder,
    running_cluster,
    was_killed,
    write_running,
)
from homeinfer.process_start import process_start


def test_a_head_that_has_ended_is_not_taken_for_one_that_runs(temp_folder: Path) -> None:
    run_folder(temp_folder).mkdir()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        its = RunningCluster(process.pid, process_start(process.pid), "ipc://clients.sock", "k" * 40, "m.gguf")
        write_running(temp_folder, its)
        assert running_cluster(temp_folder) == its
    finally:
        process.kill()
    wait_for_its_end(process)
    assert running_cluster(temp_folder) is None, "a zombie: nobody has asked for its exit status yet"
    process.communicate()
    assert running_cluster(temp_folder) is None
    assert was_killed(temp_folder)
    remove_running(temp_folder)
    assert not was_killed(temp_folder)


def wait_for_its_end(process: subprocess.Popen[bytes]) -> None:
    """Without taking its exit status."""
    its = psutil.Process(process.pid)
    while its.is_running() and its.status() != psutil.STATUS_ZOMBIE:
        pass
