"""Processes told apart by when they started, whatever is done to the clock."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from homeinfer.process_start import process_start

SAYS = "from homeinfer.process_start import process_start; print(process_start(), flush=True); input()"


def test_a_process_and_others_say_the_same_of_its_start_and_none_of_one_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", SAYS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        its_own = float(process.stdout.readline())
        assert process_start() <= its_own == process_start(process.pid)
        process.communicate(b"\n")
    with pytest.raises(psutil.NoSuchProcess):
        process_start(process.pid)
