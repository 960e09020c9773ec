"""Clusters of real processes on this machine: a coordinator with its agent, and devices that have joined."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil

from homeinfer.cluster.agent_options import AgentOptions, AgentStart
from homeinfer.cluster.client import ClusterClient, ClusterTeller
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.running import running_cluster
from homeinfer.cluster.members import Members
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Workload
from homeinfer.cluster.planning.profile import DeviceProfile, Network
from homeinfer.cluster.wire.client import ClusterStatus
from homeinfer.cluster.wire.keys import own_keys
from homeinfer.engine.request import Request, Sampling
from homeinfer.model.header import read_header
from tests.support.processes import running
from tests.support.profiles import Machine, device_of

N_CTX = 256
GREEDY = Sampling(temperature=0)
MUCH = 2_000_000_000
"""Bytes of memory: for all of SmolLM2 and its cache, many times over."""


def profile(model: Path, name: str, memory_bytes: int = MUCH, rate: float = 10e9) -> DeviceProfile:
    """A device that needs no measuring."""
    shape = model_shape(read_header(model), Workload(n_ctx=N_CTX))
    network = Network(bytes_per_s=1e8, latency_s=1e-4)
    return device_of(Machine(name, memory_bytes, rate, 1e11, 1e9, network=network), shape)


def free_port() -> int:
    """One whose next is free too, and neither of those that the system hands out meanwhile (32768 and more)."""
    while True:
        port = random.randrange(20_000, 32_000, 2)
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


class Home:
    """The folders of one device, and what runs there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, module: str, line: msgspec.Struct) -> None:
        environment = {
            **os.environ,
            "HOMEINFER_STATE": str(self.state),
            "HOMEINFER_WEIGHTS": str(self.folder / "weights"),
        }
        environment["HOMEINFER_WINDOWS"] = str(self.folder / "windows")
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
            )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(line) + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """As by a power cut."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self, seconds: float = 60) -> None:
        """Ask it to end; AssertionError when it does not."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(seconds)

    def log(self) -> str:
        return (self.folder / "log").read_text("utf-8", "replace")


class TestCluster:
    """A head, and any number of devices that are paired with it already."""

    __test__ = False

    def __init__(self, folder: Path, options: ClusterOptions) -> None:
        self.options = msgspec.structs.replace(options, port=free_port())
        self.head = Home(folder / "desk")
        self.devices: dict[str, Home] = {}

    def up(self) -> None:
        self.head.start("homeinfer.cluster.coordinator", self.options)

    def join(self, name: str) -> Home:
        """Start the agent of a device that is registered at the head (and register it)."""
        home = self.devices.setdefault(name, Home(self.head.folder.parent / name))
        Members(self.head.state).add(name, own_keys(home.state).public)
        options = AgentOptions(
            hosts=("127.0.0.1",),
            port=self.options.port,
            key=own_keys(self.head.state).public,
            name=name,
            n_threads=1,
            stays=True,
        )
        home.start("homeinfer.cluster.agent", AgentStart(options))
        return home

    def status(self) -> ClusterStatus | None:
        """None while nobody answers."""
        if running_cluster(self.head.state) is None:
            return None
        with contextlib.closing(ClusterClient(self.head.state)) as client:
            return client.status()

    def wait(self, true: Callable[[ClusterStatus], bool], seconds: float = 90) -> ClusterStatus:
        """Until the cluster says so."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Exception):
                status = self.status()
                if status is not None and true(status):
                    return status
            assert time.monotonic() < deadline, f"not in {seconds:.0f} s: {self.status()}\n{self.logs()}"
            time.sleep(0.05)

    def ready(self, devices: int, seconds: float = 90) -> ClusterStatus:
        """Until so many devices run the model together."""
        return self.wait(lambda s: s.state == "ready" and sum(bool(d.layers) for d in s.devices) == devices, seconds)

    def logs(self) -> str:
        homes = [self.head, *self.devices.values()]
        return "\n".join(
            f"{home.folder.name}: {home.log()[-3000:]}" for home in homes if (home.folder / "log").exists()
        )

    def tell(
        self, prompt: list[int], limit: int, on_token: Callable[[int], None] = lambda _token: None
    ) -> tuple[list[int], list[str]]:
        """A greedy answer's tokens, and the lines that its user saw meanwhile."""
        notices: list[str] = []
        status = self.status()
        assert status is not None
        tokens: list[int] = []

        def take(token: int) -> None:
            tokens.append(token)
            on_token(token)

        with contextlib.closing(ClusterTeller(self.head.state, status, notices.append)) as teller:
            teller.tell(prompt, Request(GREEDY, limit, fresh=True), take, lambda: False)
        return tokens, notices

    def down(self) -> None:
        for home in (self.head, *self.devices.values()):
            home.end()


def processes(root: int, module: str) -> list[psutil.Process]:
    """Those below a process that run a module."""
    return running(module, root, recursive=True)


@contextlib.contextmanager
def cluster(folder: Path, options: ClusterOptions) -> Iterator[TestCluster]:
    """Not up yet; taken down at the end, and nothing of it is left running."""
    made = TestCluster(folder, options)
    try:
        yield made
    except BaseException:
        print(made.logs())
        raise
    finally:
        pids = [home.process.pid for home in (made.head, *made.devices.values()) if home.process is not None]
        below = [
            child for pid in pids if psutil.pid_exists(pid) for child in psutil.Process(pid).children(recursive=True)
        ]
        try:
            made.down()
        finally:
            _, left = psutil.wait_procs(below, timeout=60)
            for process in left:
                process.kill()
        assert not left, left


def of_two(model: Path, **changes: object) -> ClusterOptions:
    """Options of a head that waits for one device, both of one thread and on this host. changes: of these."""
    options = ClusterOptions(
        model=str(model),
        name="desk",
        host="127.0.0.1",
        devices=2,
        n_ctx=256,
        threads=1,
        n_batch=64,
        announces=False,
        opens_code=False,
    )
    return msgspec.structs.replace(options, **changes)


@contextlib.contextmanager
def desk_and_box(model: Path, box_rate: float = 10e9, **changes: object) -> Iterator[TestCluster]:
    """A head and a device that serve, in a folder of their own. changes: of the options."""
    folder = Path(tempfile.mkdtemp(prefix="hi-test-"))
    profiles = (profile(model, "desk"), profile(model, "box", rate=box_rate))
    try:
        with cluster(folder, of_two(model, **{"profiles": profiles, **changes})) as made:
            made.up()
            made.join("box")
            made.ready(2)
            yield made
    finally:
        shutil.rmtree(folder)
