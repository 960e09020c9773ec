"""A real cluster on the testbed's home: a head, joined devices, and answers of it. For the cluster's scripts.

Each device is a network namespace with its own folders; commands are those that a user types.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from homeinfer.cluster.client import find_cluster
from homeinfer.cluster.wire.client import ClusterStatus
from homeinfer.errors import HomeinferError

TESTBED = Path(__file__).resolve().parents[2] / "shared" / "testbed" / "homes.py"


class HomeOptions(msgspec.Struct, frozen=True):
    """memory: each device's limit ("none" for no limit); cpus: each device's share of cores, None for no limit; mbit:
    each link's rate, 0 for no limit."""

    memory: tuple[str, ...]
    cpus: float | None = None
    mbit: int = 0
    name: str = "ring"


class Home:
    """The testbed's devices, and a folder for each. Use `home(...)`, which removes all of it."""

    def __init__(self, options: HomeOptions, testbed: Path = TESTBED) -> None:
        self.options = options
        self.count = len(options.memory)
        self._words = (sys.executable, str(testbed), "--name", options.name)
        self.root = Path(tempfile.mkdtemp(prefix="hi-home-"))
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        words = ["up", str(self.count), "--mem", ",".join(self.options.memory)]
        words += ["--cpus", str(self.options.cpus)] if self.options.cpus else []
        words += ["--rate", f"{self.options.mbit}mbit"] if self.options.mbit else []
        self.testbed(*words)

    def testbed(self, *words: str) -> str:
        """One command of the testbed. Raises SystemExit when it fails."""
        done = subprocess.run([*self._words, *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"homes.py {' '.join(words)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def folder(self, device: int, what: str = "state") -> Path:
        return self.root / str(device) / what

    def environment(self, device: int) -> dict[str, str]:
        """In which a device has folders of its own; what profiling measured is shared: it is one machine."""
        folders = {
            "HOMEINFER_STATE": str(self.folder(device)),
            "HOMEINFER_WEIGHTS": str(self.folder(device, "weights")),
            "HOMEINFER_WINDOWS": str(self.folder(device, "windows")),
        }
        return {**os.environ, **folders, "TMPDIR": str(self.root), "COLUMNS": "160"}

    def start(self, device: int, *command: str) -> subprocess.Popen[bytes]:
        """`homeinfer COMMAND` on a device, in the background; its output goes to a file of the device."""
        self.folder(device).mkdir(parents=True, exist_ok=True)
        with self.log(device).open("ab") as log:
            process = subprocess.Popen(
                [*self.launch(device), sys.executable, "-m", "homeinfer", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(device),
                cwd=self.folder(device),
                start_new_session=True,
            )
        self.processes[device] = process
        return process

    def launch(self, device: int) -> tuple[str, ...]:
        """Words before a command that is to run on a device."""
        return (*self._words, "exec", str(device), "--")

    def log(self, device: int) -> Path:
        return self.root / str(device) / "log"

    def family(self, device: int) -> list[psutil.Process]:
        """A device's command and all that it started."""
        try:
            top = psutil.Process(self.processes[device].pid)
            return [top, *top.children(recursive=True)]
        except psutil.Error:
            return []

    def drop(self) -> None:
        """Evict all window and weight files from the page cache."""
        files = [str(path) for path in self.root.rglob("*.gguf")]
        if files:
            self.testbed("drop", *files)

    def down(self) -> None:
        """End all, politely first; what does not end by itself is said and ended."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 30
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        for device, process in self.processes.items():
            if process.poll() is None:
                print(f"device {device} does not end: {_tail(self.log(device))}", file=sys.stderr, flush=True)
                for each in self.family(device):
                    with contextlib.suppress(psutil.Error):
                        each.kill()
        self.testbed("down")
        shutil.rmtree(self.root, ignore_errors=True)


class LoopbackHome(Home):
    """All devices are processes of this host: no limits, no cables."""

    def up(self) -> None:
        """Nothing to make."""

    def testbed(self, *words: str) -> str:
        """Only what needs no network: evicting files, and the end."""
        if words[0] not in ("drop", "down"):
            raise SystemExit(f"there are no limits and no cables without the testbed: {' '.join(words)}")
        return ""

    def launch(self, _device: int) -> tuple[str, ...]:
        return ()


@contextlib.contextmanager
def home(options: HomeOptions, testbed: Path = TESTBED, *, loopback: bool = False) -> Iterator[Home]:
    """The devices, gone again afterwards."""
    made = LoopbackHome(options, testbed) if loopback else Home(options, testbed)
    try:
        made.up()
        yield made
    finally:
        made.down()


def bring_up(
    made: Home, model: Path, *words: str, patience: float = 600.0, joining: Sequence[str] = ()
) -> ClusterStatus:
    """`cluster up` on device 0, `cluster join` on the others, until it is ready; all of them take part, also where one
    alone would be faster. words: more for `cluster up`; joining: for `cluster join`.

    Raises SystemExit with the devices' last words when it does not come up.
    """
    made.start(0, *up_words(made, model, *words))
    used = ""
    for device in range(1, made.count):
        used = code_of(made, used)
        made.start(device, "cluster", "join", used, "--name", f"device-{device}", "--stay", *joining)
    return wait_for(made, lambda status: status.state == "ready", patience)


def up_words(made: Home, model: Path, *words: str) -> tuple[str, ...]:
    """The command that brings the cluster up."""
    required = [word for device in range(1, made.count) for word in ("--require", f"device-{device}")]
    fixed = ("cluster", "up", str(model), "--yes", "--name", "device-0", "--devices", str(made.count))
    return (*fixed, *required, *words)


def code_of(made: Home, used: str = "") -> str:
    """The pairing code that follows the one that was used. Raises SystemExit when there is none after three minutes."""
    return wait_for(made, lambda status: status.code not in (None, used), 180.0).code or ""


def status_of(made: Home) -> ClusterStatus | None:
    """What the coordinator says, None while it is not there."""
    try:
        client = find_cluster(made.folder(0))
        if client is None:
            return None
        with contextlib.closing(client):
            return client.status()
    except HomeinferError:
        return None


def wait_for(made: Home, wanted: Callable[[ClusterStatus], bool], patience: float) -> ClusterStatus:
    """The first status that is as wanted. Raises SystemExit after `patience` seconds, and when the command ends."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        status = status_of(made)
        if status is not None and wanted(status):
            return status
        if made.processes[0].poll() is not None:
            break
        time.sleep(0.2)
    last = "; ".join(f"{made.log(i).parent.name}: {_tail(made.log(i))}" for i in made.processes)
    raise SystemExit(f"the cluster did not come so far: {status_of(made)} {last}")


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return " / ".join(line.strip() for line in lines[-4:])


def print_json(said: dict[str, object]) -> None:
    print(json.dumps(said, indent=2, default=lambda value: msgspec.to_builtins(value)), flush=True)


def machine(words: Sequence[str]) -> dict[str, object]:
    """What every report says of where and how it was made."""
    return {"command": " ".join(words), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
