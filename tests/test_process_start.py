"""Processes told apart by when they started, whatever is done to the clock."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from homeinfer.process_start import process_start, still_runs
from tests.support.processes import wait_until

SAYS = "from homeinfer.process_start import process_start; print(process_start(), flush=True); input()"


def test_a_process_and_others_say_the_same_of_its_start_and_none_of_one_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", SAYS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        its_own = process.stdout.readline().decode().strip()
        assert process_start() != its_own == process_start(process.pid)
        assert still_runs(process.pid, its_own)
        assert not still_runs(process.pid, process_start())
        assert process.stdin is not None
        process.stdin.close()
        wait_until(lambda: not still_runs(process.pid, its_own))  # though nobody has asked how it ended
    with pytest.raises(psutil.NoSuchProcess):
        process_start(process.pid)
