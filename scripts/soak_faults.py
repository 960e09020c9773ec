"""What can go wrong at home, done to a home on purpose, and undone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

import msgspec
import psutil
from home_cluster import Home


class Fault(msgspec.Struct, frozen=True):
    """One fault. seconds: how long it lasts before it is undone (0: it is over at once). amount: what that kind needs:
    the link's Mbit/s, or megabytes."""

    kind: str
    device: int
    seconds: float
    amount: int = 0


def draw(source: random.Random, count: int, kinds: list[str]) -> Fault:
    """The next fault: kinds and devices alike often, 1 to 60 seconds, short ones more often."""
    kind = source.choice(kinds)
    device = 0 if kind == "head" else source.randrange(0 if kind == "engine" else 1, count)
    seconds = {"engine": 0.0, "agent": source.uniform(1, 15), "head": source.uniform(1, 8)}.get(
        kind, 60 ** source.random()
    )
    return Fault(kind, device, round(seconds, 1), {"slow": 5, "memory": 150}.get(kind, 0))


def engines(made: Home, device: int) -> list[psutil.Process]:
    """The engine processes of a device."""
    found = []
    for process in made.family(device):
        with contextlib.suppress(psutil.Error):
            if "homeinfer.cluster.engine" in process.cmdline():
                found.append(process)
    return found


class Faults:
    """Does and undoes faults. restart: how a device's command is started again; on_killed: to be called when one was
    killed."""

    def __init__(self, made: Home, restart: Callable[[int], None], on_killed: Callable[[], None]) -> None:
        self._home, self._restart, self._on_killed, self._sleep = made, restart, on_killed, time.sleep

    def do(self, fault: Fault) -> None:
        """The fault from its beginning to its end."""
        getattr(self, f"_{fault.kind}")(fault)

    def _engine(self, fault: Fault) -> None:
        for engine in engines(self._home, fault.device):
            with contextlib.suppress(psutil.Error):
                engine.kill()
        self._on_killed()

    def _agent(self, fault: Fault) -> None:
        self._kill(fault.device)
        self._sleep(fault.seconds)
        self._restart(fault.device)

    def _head(self, fault: Fault) -> None:
        self._kill(0)
        self._sleep(fault.seconds)
        self._restart(0)

    def _kill(self, device: int) -> None:
        """The command itself only: what it had started must notice."""
        top = self._home.processes[device]
        with contextlib.suppress(ProcessLookupError):
            os.kill(top.pid, signal.SIGKILL)
        top.wait()
        self._on_killed()

    def _cut(self, fault: Fault) -> None:
        self._home.testbed("cut", str(fault.device))
        self._sleep(fault.seconds)
        self._home.testbed("heal", str(fault.device))

    def _slow(self, fault: Fault) -> None:
        self._home.testbed("rate", str(fault.device), f"{fault.amount}mbit")
        self._sleep(fault.seconds)
        self._home.testbed("rate", str(fault.device), f"{self._home.options.mbit or 1000}mbit")

    def _memory(self, fault: Fault) -> None:
        with contextlib.suppress(SystemExit):  # the kernel refuses a limit below what can't be given back
            self._home.testbed("mem", str(fault.device), f"{fault.amount}M")
        self._sleep(fault.seconds)
        self._home.testbed("mem", str(fault.device), self._home.options.memory[fault.device])

    def _asleep(self, fault: Fault) -> None:
        family = self._home.family(fault.device)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        self._sleep(fault.seconds)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.resume()
