"""Engine processes as a test meets them: found, killed, gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

ENDLESS = ("-p", "1, 2, 3, 4, 5, 6,", "--raw", "--temp", "0", "-n", "4000")
"""Options of `homeinfer run` for an answer that surely goes on: SmolLM2 counts, and nothing is drawn by lot."""


def engines(pid: int | None = None) -> list[psutil.Process]:
    """The engine processes that this process, or the one with this pid, has started, in that order."""
    return sorted(running("homeinfer.cluster.engine", pid), key=lambda child: (child.create_time(), child.pid))


def running(module: str, pid: int | None = None, *, recursive: bool = False) -> list[psutil.Process]:
    """The processes running a module that this process, or the one with this pid, has started; none that has just
    ended."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(os.getpid() if pid is None else pid).children(recursive=recursive):
            with contextlib.suppress(psutil.Error):
                if module in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
    return found


def held_back(folder: Path, *modules: str) -> dict[str, str]:
    """Environment in which processes that run these modules stop as they begin: what a test does to one comes in time,
    however busy the machine is. folder: for what makes them do so."""
    condition = f"if {{*sys.orig_argv}} & {set(modules)!r}:"
    stop = f"import os, signal, sys\n{condition}\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    (folder / "sitecustomize.py").write_text(stop)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))}


def have_stopped(processes: Iterable[psutil.Process]) -> bool:
    """Whether there are any, and `held_back` holds them all."""
    try:
        states = {process.status() for process in processes}
    except psutil.Error:
        return False
    return states == {psutil.STATUS_STOPPED}


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    """What a failed test leaves of a command, with those it started, which may be held back for ever."""
    try:
        yield
    finally:
        if process.poll() is None:
            top = psutil.Process(process.pid)
            for each in (*top.children(recursive=True), top):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.communicate()


def have_ended(processes: Iterable[psutil.Process]) -> bool:
    """Whether none of them runs any more; one whose exit status nobody has taken has ended too."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def wait_until(true: Callable[[], bool], seconds: float = 120, pause: float = 0.02) -> None:
    """Look again and again; AssertionError when it does not become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true after {seconds:.0f} seconds"
        time.sleep(pause)
